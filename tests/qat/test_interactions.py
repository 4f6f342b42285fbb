"""Parts of training that meet: stages and learned scales, frozen things, packed bases, what is refused together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.commands.train import DEFAULTS, with_recipe
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.activation import get_act
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot import api
from lowbit.models import decoder
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.qat import latents
from lowbit.train import optimizer
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.train.oscillation import track

UP = "model.layers.1.mlp.up_proj"
logits = jax.jit(decoder.forward, static_argnames="config")
TOKENS = jnp.asarray(rows()(0)["tokens"])


def leaf(tree, path=UP):
    return dict(trees.items(tree))[path]


def plan(fmt: str, act: str | None = None) -> dict:
    return Plan((Rule(r".*layers.*:in", act),) if act else (), fmt).resolve(CONFIG.shapes())


def test_a_stage_keeps_what_it_does_not_change():
    first, second = plan("int4:channel", "int4:lsq"), plan("int3:channel", "int4:lsq")
    stored = {p: {"scale": jnp.float32(0.5)} for p in first if not p.endswith(":in")}
    r = qat.get("lsq")
    tree = r.prepare(params(), first, stored=stored)
    moved = trees.map_leaves(
        lambda _, a: dataclasses.replace(a, params={"scale": jnp.float32(0.7)}) if isinstance(a, PreparedInput) else a,
        tree,
    )
    again = {n: latents.kept(moved, r.prepare(latents.masters(moved), p, stored=stored)) for n, p in
             (("same", first), ("other", second))}  # fmt: skip
    assert float(leaf(again["same"]).params["scale"]) == float(leaf(again["other"]).params["scale"]) == np.float32(0.7)
    assert leaf(again["same"]).w.params is leaf(moved).w.params
    assert leaf(again["other"]).w.format.name == "int3:channel:lsq"
    np.testing.assert_array_equal(leaf(again["other"]).w.w, leaf(moved).w.w)


def test_recipes_that_cannot_restart_say_so():
    names = {n for n in qat.names() if qat.get(n).restarts}
    assert {"ste", "ste-learned", "lsq", "paretoq", "bitnet", "llm-qat", "dorefa", "pact"} <= names
    assert not names & {"e2e-qp", "block-ap", "efficientqat", "qlora", "loftq", "qa-lora", "parq", "binary-relax"}


@pytest.mark.parametrize("changes", [{"scale_lr": 0.0}, {"lr_groups": ((r".*q_proj", 0.0),)}])
def test_the_optimizer_must_own_what_it_takes_to_the_grid(changes):
    r, settings = qat.get("parq"), TrainConfig(steps=1, batch_size=4, **changes)
    with pytest.raises(InputError, match="is frozen, in a recipe whose optimizer takes it to the grid"):
        train(r.prepare(params(), plan("int4:channel")), rows(), language(CONFIG, settings), settings, wrap=r.wrap)
    for name in ("parq", "binary-relax"):
        with pytest.raises(InputError, match=f"'dorefa2:tensor' with recipe {name}: rounding it twice"):
            qat.get(name).prepare(params(), plan("dorefa2:tensor"))


@pytest.mark.parametrize("name", ["int1:channel", "int2:channel:midrise", "int4:channel:asym", "mxfp4"])
def test_frozen_codes_are_codes(name: str):
    fmt = base.get(name)
    w = {"a": jnp.asarray(np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32))}
    w |= {f"a:{k}": v for k, v in fmt.fitted(w["a"]).items()}
    tx, there = track(optax.scale(1.0), {"a": fmt}, 0.5, 0.1), jnp.sign(w["a"])
    state = tx.init(w)

    @jax.jit
    def step(w, state, sign):
        updates = {k: jnp.zeros_like(v) for k, v in w.items()} | {"a": sign * there * 2}
        updates, state = tx.update(updates, state, w)
        return optax.apply_updates(w, updates), state

    for i in range(8):
        w, state = step(w, state, 1.0 if i % 2 else -1.0)
    found = state.tracks["a"]
    stored = fmt.stored({k: v for k, v in ((k.removeprefix("a:"), v) for k, v in w.items()) if k != "a"})
    own = np.asarray(fmt.quantize(fmt.dequantize(found.code, stored), stored))
    assert np.asarray(found.frozen).any()
    np.testing.assert_array_equal(own, found.code)


def test_tracking_is_refused_where_codes_cannot_be_followed():
    def run(recipe: str, fmt: str, **changes):
        r, settings = qat.get(recipe), TrainConfig(steps=1, batch_size=4, **changes)
        train(r.prepare(params(), plan(fmt)), rows(), language(CONFIG, settings), settings)

    with pytest.raises(InputError, match=":scale is frozen and its codes are tracked"):
        run("ste-learned", "int4:channel", track_codes=True, scale_lr=0.0)
    with pytest.raises(InputError, match="freeze_above with format 'dorefa2:tensor'"):
        run("dorefa", "dorefa2:tensor", freeze_above=0.1)
    for changes in ({"track_codes": True}, {"freeze_above": 0.1}):
        with pytest.raises(InputError, match="without latent weights"):
            run("qlora:r2", "nf4:g16", **changes)
    with pytest.raises(InputError, match="quant_warmup without anything that it warms up"):
        run("qlora:r2", "nf4:g16", quant_warmup=1)


def test_codes_with_trained_scales_multiply_as_integers_too():
    assignment = plan("int4:channel", "int8:token")
    r = qat.get("e2e-qp")
    tree = r.prepare(params(), assignment)
    assert isinstance(leaf(tree).w, Coded)
    np.testing.assert_array_equal(logits(tree, TOKENS, CONFIG), logits(r.convert(tree), TOKENS, CONFIG))
    with pytest.raises(InputError, match="format 'nf4:g16:dq' has no scales to train"):
        r.prepare(params(), plan("nf4:g16:dq"))


def test_one_sided_activations_have_larger_codes():
    w = jnp.ones((2, 800))
    act = get_act("int8:pact:pos")
    fits = PreparedInput(base.get("int8:channel").encode(w), act, None, {"scale": jnp.float32(1)})
    assert api._integers(jnp.ones((1, 800)), fits) is None  # 800 x 255 x 128 > 2^24
    signed = dataclasses.replace(fits, act=get_act("int8:pact"))
    assert api._integers(jnp.ones((1, 800)), signed) is not None


def test_adapters_over_a_packed_base_with_quantized_inputs():
    assignment = plan("nf4:g16", "int8:token")
    packed = rtn.quantize(params(), {p: f for p, f in assignment.items() if not p.endswith(":in")})
    tree = qat.get("qlora:r2").prepare(packed, assignment)
    found = leaf(tree)
    assert found.act.name == "int8:token" and isinstance(found.w, Adapter) and isinstance(found.w.w, QTensor)
    with pytest.raises(InputError, match="up_proj:in: activation format int8:tensor stores|_proj:in: activation"):
        qat.get("qlora:r2").prepare(packed, plan("nf4:g16", "int8:tensor"))


def test_fingerprints_see_the_scaling_of_an_adapter():
    found = set()
    for alpha in (1, 4):
        tree = qat.get(f"qlora:r2:a{alpha}").prepare(params(), plan("nf4:g16"))
        found.add(Model(CONFIG, tree).fingerprint())
    assert len(found) == 2


def test_scale_decay_is_of_scales_alone():
    config = TrainConfig(steps=2, lr=1.0, schedule="constant", scale_decay=0.5, clip=0.0, optimizer="sgd", b1=0.0)
    names = ("a", "a:scale", "a:zero", "a:lora_a", "a:input.scale")
    w = {n: jnp.ones((4, 4)) for n in names}
    tx = optimizer.build(config, w, dict.fromkeys(w, 1.0))
    updates = jax.jit(lambda w: tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)[0])(w)
    assert {n for n, u in updates.items() if float(jnp.abs(u).max())} == {"a:scale", "a:input.scale"}


def test_a_flag_that_was_given_is_the_users():
    defaults = {"lr": 2e-5, "schedule": "two-stage"}
    assert with_recipe(DEFAULTS, defaults, ["train", "m"]).schedule == "two-stage"
    said = with_recipe(DEFAULTS, defaults, ["train", "m", "--schedule=cosine", "--lr", "3e-4"])
    assert (said.schedule, said.lr) == ("cosine", 3e-4)

"""BitNet: the formulas, the integer forward pass, rotations that are trained through, warm-up and stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.activation import get_act
from lowbit.models import decoder
from lowbit.models.config import from_hf, to_hf
from lowbit.plan import Plan, Rule
from lowbit.qat import latents
from lowbit.train import optimizer
from lowbit.train.config import TrainConfig
from lowbit.train.loop import Stage, train
from lowbit.train.objective import language
from lowbit.train.params import mixed
from tests.models.tiny import params_of

UP, DOWN, O = (f"model.layers.1.{n}_proj" for n in ("mlp.up", "mlp.down", "self_attn.o"))
TERNARY = Plan.uniform("ternary:tensor").resolve(CONFIG.shapes())
TOKENS = jnp.asarray(rows()(0)["tokens"])
# 16 features of o_proj are 4 heads of 8; down_proj reads 48.
logits = jax.jit(decoder.forward, static_argnames=("config", "dtype"))


def leaf(tree, path):
    return dict(trees.items(tree))[path]


def test_one_bit_weights_are_centered_and_their_scale_is_not():
    w = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32) + 0.3
    got = np.asarray(base.get("int1:tensor:centered:f32").encode(jnp.asarray(w)).decode())
    np.testing.assert_allclose(got, np.where(w - w.mean() >= 0, 1, -1) * np.abs(w).mean(), rtol=1e-5)
    plain = np.asarray(base.get("int1:tensor:f32").encode(jnp.asarray(w)).decode())
    assert (np.sign(plain) == np.sign(w)).all() and (got != plain).any()
    with pytest.raises(InputError, match="centered of int2 .allowed: int1 without asym"):
        base.get("int2:tensor:centered")


def test_upper_half_of_a_token():
    """a4.8: Q_INT8(X) times the mask of the 50 % largest magnitudes, both straight-through."""
    x = np.random.default_rng(1).standard_normal((3, 33)).astype(np.float32)
    act = get_act("int8:token:bitnet:top50")
    y, pull = jax.jit(lambda x: jax.vjp(act.fake_quant, x))(x)
    whole = np.asarray(get_act("int8:token:bitnet").fake_quant(jnp.asarray(x)))
    order = np.argsort(-np.abs(x), axis=1)
    for row in range(3):
        keep = np.zeros(33, bool)
        keep[order[row, :17]] = True  # 50 % of 33, rounded up
        np.testing.assert_array_equal(y[row], np.where(keep, whole[row], 0))
    assert (np.asarray(pull(jnp.ones_like(y))[0]) == 1).all()
    codes, scale = act.codes(jnp.asarray(x), {})
    np.testing.assert_array_equal(np.asarray(codes) * np.asarray(scale), y)
    for bad in ("int8:token:asym:top50", "int8:token:g16:top50", "int8:tensor:top50"):
        with pytest.raises(InputError, match="top50 .allowed: with token, without groups and asym"):
            get_act(bad)


def test_which_inputs_get_which_format():
    plan = Plan((Rule(r".*up_proj:in", "int6:token"),), "ternary:tensor").resolve(CONFIG.shapes())
    tree = qat.get("bitnet").prepare(params(), plan)
    assert leaf(tree, UP).act.name == "int6:token" and leaf(tree, DOWN).act.name == "int8:token:bitnet"
    tree = qat.get("bitnet-a4.8").prepare(params(), TERNARY)
    names = {p.rpartition(".")[2]: leaf(tree, p).act.name for p in TERNARY}
    assert names.pop("o_proj") == "int8:token:bitnet:top50" and names.pop("down_proj") == "int8:token:bitnet"
    assert set(names.values()) == {"int4:token:bitnet"}
    tree = qat.get("bitnet-v2").prepare(params(), TERNARY)
    assert {p for p in TERNARY if leaf(tree, p).op is not None} == {
        p for p in TERNARY if p.endswith(("o_proj", "down_proj"))
    }
    assert leaf(tree, DOWN).op.name == "hadamard:48"


@pytest.mark.parametrize(
    "recipe", ["bitnet-a4.8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bitnet", "bitnet-v2"))]
)
@pytest.mark.parametrize("sub_norm", ["sub", pytest.param("per_linear", marks=pytest.mark.slow)])
def test_packed_is_what_was_trained(recipe: str, sub_norm: str):
    config = dataclasses.replace(CONFIG, sub_norm=sub_norm, activation="relu2")
    r = qat.get(recipe)
    start = r.prepare(params_of(config), TERNARY)
    settings = TrainConfig(**{"steps": 2, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.1} | r.defaults)
    done = train(start, rows(), language(config, settings), settings).params
    packed = r.convert(done)
    np.testing.assert_array_equal(logits(done, TOKENS, config), logits(packed, TOKENS, config))
    norm = "model.layers.0.mlp.ffn_sub_norm" if sub_norm == "sub" else "model.layers.0.mlp.up_proj_norm"
    assert (np.asarray(leaf(done, norm)) != np.asarray(leaf(start, norm))).any()


def test_gradient_goes_through_the_rotation():
    """H-BitLinear: equal to autodiff through the dense matrix."""
    tree = qat.get("bitnet-v2").prepare(params(), TERNARY)
    q, x = leaf(tree, DOWN), jnp.asarray(np.random.default_rng(2).standard_normal((5, 48)), jnp.float32)
    dense = jnp.asarray(q.op.dense(48), jnp.float32)
    g = np.random.default_rng(3).standard_normal((5, 48)).astype(np.float32)
    got = jax.jit(lambda x: jax.vjp(q.prepare, x)[1](jnp.asarray(g))[0])(x)
    np.testing.assert_allclose(got, g @ dense, rtol=1e-4, atol=1e-5)
    # Rotated latents compute what the original weight did, before any rounding.
    w = leaf(params(), DOWN)
    np.testing.assert_allclose((x @ dense.T) @ q.w.w.T, x @ w.T, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_warm_up_starts_at_the_unquantized_model_and_ends_at_the_quantized_one():
    tree = qat.get("bitnet").prepare(params(1), TERNARY)
    full, none = (logits(mixed(tree, jnp.float32(m)), TOKENS, CONFIG) for m in (1.0, 0.0))
    np.testing.assert_array_equal(none, logits(params(1), TOKENS, CONFIG))
    # At 1 the values are the quantized ones, multiplied as values and not as integers.
    assert float(jnp.mean(jnp.abs(full - logits(tree, TOKENS, CONFIG)))) < 1e-2 * float(jnp.mean(jnp.abs(full)))
    losses = {}
    for warm in (0, 2):
        settings = TrainConfig(steps=3, batch_size=4, lr=1e-9, schedule="constant", quant_warmup=warm, log_every=1)
        losses[warm] = [h["loss"] for h in train(tree, rows(), language(CONFIG, settings), settings).history]
    objective = language(CONFIG, settings)
    total, n = jax.jit(lambda p, b: objective(p, None, b))(params(1), rows()(0))
    np.testing.assert_allclose(losses[2][0], total / n, rtol=1e-5)  # step 0: no quantization
    np.testing.assert_allclose(losses[2][2], losses[0][2], rtol=1e-4)  # from step 2 on: all of it
    assert abs(losses[2][1] - losses[0][1]) > 1e-3
    with pytest.raises(InputError, match="quant_warmup is 4 .allowed: at most steps, 3"):
        TrainConfig(steps=3, quant_warmup=4)


def test_two_stages_of_rate_and_decay():
    c = TrainConfig(
        steps=100, lr=1.5, schedule="two-stage", lr_second=2 / 3, weight_decay=0.1, decay_until=0.5, clip=0.0
    )
    lr = np.asarray(jax.jit(optimizer.schedule(c))(np.arange(100)))
    t = np.arange(100)
    np.testing.assert_allclose(lr, np.where(t < 50, 1.5, 1.0) * (1 - t / 100), rtol=1e-5)
    assert np.sum(np.diff(lr) < -0.1) == 1  # continuous but for one drop
    w = {"model.layers.0.mlp.up_proj": jnp.ones((4, 4))}
    tx = optimizer.build(c, w, {n: 1.0 for n in w})
    state, zero = tx.init(w), {n: jnp.zeros((4, 4)) for n in w}
    step = jax.jit(lambda s: tx.update(zero, s, w))
    moved = []
    for _ in range(100):
        update, state = step(state)
        moved.append(float(update["model.layers.0.mlp.up_proj"][0, 0]))
    np.testing.assert_allclose(moved[:50], -0.1 * lr[:50], rtol=1e-5)
    assert moved[50:] == [0.0] * 50


def stage(step: int, recipe: str, assignment) -> Stage:
    r = qat.get(recipe)
    return Stage(step, lambda tree: r.prepare(latents.masters(tree), assignment))


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_stages_keep_the_optimizer_and_resume_to_the_same_bits(tmp_path, stop: int):
    """a4.8: the same latents and moments, other inputs; killed before, at and after the change."""
    settings = TrainConfig(steps=4, batch_size=4, lr=1e-2, save_every=1, log_every=1, keep=9)
    objective = language(CONFIG, settings)
    start = qat.get("bitnet").prepare(params(), TERNARY)
    stages = [stage(2, "bitnet-a4.8", TERNARY)]
    whole = train(start, rows(), objective, settings, stages=stages)
    assert leaf(whole.params, UP).act.name == "int4:token:bitnet"

    def kill(step: int, metric: float) -> None:
        if step == stop + 1:
            raise Killed

    with pytest.raises(Killed):
        train(
            start, rows(), objective, settings, directory=tmp_path, stages=stages,
            evaluate=lambda p: 0.0, on_evaluate=kill,
        )  # fmt: skip
    again = train(start, rows(), objective, settings, directory=tmp_path, stages=stages, resume=True)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stages_are_checked_and_change_what_is_trained():
    settings = TrainConfig(steps=6, batch_size=4)
    start = qat.get("bitnet").prepare(params(), TERNARY)
    for steps in ([3, 3], [0], [6], [4, 2]):
        with pytest.raises(InputError, match="stages at steps .*allowed: rising, from 1 to 5"):
            stages = [stage(s, "bitnet", TERNARY) for s in steps]
            train(start, rows(), language(CONFIG, settings), settings, stages=stages)


@pytest.mark.slow
def test_gradual_bit_width():
    """8, then 4, then 2 bits: scales are fitted anew, latents go on."""
    plans = {b: Plan.uniform(f"int{b}:g16").resolve(CONFIG.shapes()) for b in (8, 4, 2)}
    settings = TrainConfig(steps=3, batch_size=4, lr=1e-2, log_every=1)
    start = qat.get("ste-learned").prepare(params(), plans[8])
    done = train(
        start, rows(), language(CONFIG, settings), settings,
        stages=[stage(1, "ste-learned", plans[4]), stage(2, "ste-learned", plans[2])],
    )  # fmt: skip
    q = leaf(done.params, UP)
    assert q.format.name == "int2:g16"
    assert (np.asarray(q.w) != np.asarray(leaf(start, UP).w)).mean() > 0.5


def test_refusals():
    with pytest.raises(InputError, match="'int4:channel' with recipe bitnet .allowed: ternary, int1"):
        qat.get("bitnet").prepare(params(), Plan.uniform("int4:channel").resolve(CONFIG.shapes()))
    odd = dataclasses.replace(CONFIG, intermediate_size=50)
    with pytest.raises(InputError, match="recipe bitnet-v2: input of model.layers.0.mlp.down_proj: .*50"):
        qat.get("bitnet-v2").prepare(params_of(odd), Plan.uniform("ternary:tensor").resolve(odd.shapes()))
    hf = to_hf(dataclasses.replace(CONFIG, sub_norm="sub"), native=True)
    with pytest.raises(InputError, match="unknown sub_norm 'both'"):
        from_hf(hf | {"lowbit": {"sub_norm": "both"}})

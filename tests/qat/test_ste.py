"""Recipe `ste`: what is trained is what is packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.decoder import forward
from lowbit.plan import Plan, Rule

MIXED = Plan(
    (
        Rule(r".*\.layers\.1\.self_attn\..*", "int8:channel"),
        Rule(r"model\.embed_tokens", "int8:channel"),
        Rule(r".*\.down_proj:in", "int8:token"),
    ),
    "int2:g16",
)
PLANS = {name: Plan.uniform(name) for name in ("int3:g16:asym", "ternary:tensor")}
PLANS["mixed"] = MIXED


@pytest.mark.parametrize(
    "recipe, plan, dtype",
    [
        pytest.param("ste", "int3:g16:asym", "float32", marks=pytest.mark.slow),
        pytest.param("ste", "ternary:tensor", "float32", marks=pytest.mark.slow),
        ("ste", "mixed", "bfloat16"),
        ("ste-learned", "mixed", "float32"),
    ],
)
def test_forward_of_packed_equals_forward_in_training(plan, recipe, dtype):
    r = qat.get(recipe)
    original = params(1)
    latent = r.prepare(original, PLANS[plan].resolve(CONFIG.shapes()))
    packed = r.convert(latent)
    tokens = jnp.asarray(rows()(0)["tokens"])
    logits = jax.jit(lambda p: forward(p, tokens, CONFIG, dtype=jnp.dtype(dtype)))
    a, b = np.asarray(logits(latent)), np.asarray(logits(packed))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, np.asarray(logits(original)))  # something was quantized


def test_prepare_makes_float32_masters_and_keeps_the_rest():
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
    out = dict(trees.items(qat.get("ste").prepare(p, MIXED.resolve(CONFIG.shapes()))))
    assert isinstance(out["model.embed_tokens"], Latent) and out["model.embed_tokens"].w.dtype == jnp.float32
    down = out["model.layers.0.mlp.down_proj"]
    assert isinstance(down, PreparedInput) and isinstance(down.w, Latent) and down.act.name == "int8:token"
    assert out["lm_head"].dtype == jnp.bfloat16 and out["model.norm"].dtype == jnp.bfloat16


def test_learned_recipe_stores_scales_that_start_at_init():
    assignment = Plan.uniform("int4:g16").resolve(CONFIG.shapes())
    out = dict(trees.items(qat.get("ste-learned").prepare(params(), assignment)))
    q = out["model.layers.0.self_attn.q_proj"]
    assert q.params["scale"].shape == (32, 2) and q.params["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(q.params["scale"], q.format.init(q.w)["scale"])


def test_learned_scales_get_a_gradient_and_dynamic_ones_reach_the_weight():
    assignment = Plan.uniform("int3:g16").resolve(CONFIG.shapes())
    tokens = jnp.asarray(rows()(0)["tokens"])
    for name in ("ste", "ste-learned"):
        latent = qat.get(name).prepare(params(), assignment)
        grads = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(forward(p, tokens, CONFIG)))))(latent)
        q = grads["model"]["layers"]["1"]["mlp"]["up_proj"]
        assert float(jnp.mean(q.w != 0)) > 0.5
        assert (float(jnp.abs(q.params["scale"]).max()) > 0) if name == "ste-learned" else q.params == {}


def test_convert_packs_every_latent_and_keeps_inputs():
    r = qat.get("ste")
    out = dict(trees.items(r.convert(r.prepare(params(), MIXED.resolve(CONFIG.shapes())))))
    assert not [p for p, leaf in out.items() if isinstance(leaf, Latent)]
    down = out["model.layers.1.mlp.down_proj"]
    assert isinstance(down, PreparedInput) and isinstance(down.w, QTensor)


def test_refusals():
    r, p = qat.get("ste"), params()
    assignment = Plan.uniform("int4:g16").resolve(CONFIG.shapes())
    with pytest.raises(InputError, match="did you mean 'ste'"):
        qat.get("set")
    with pytest.raises(InputError, match="no parameter 'model.layers.7.x'"):
        r.prepare(p, {"model.layers.7.x": assignment["model.layers.0.self_attn.q_proj"]})
    with pytest.raises(InputError, match="q_proj is a Latent already"):
        r.prepare(r.prepare(p, assignment), assignment)
    static = Plan((Rule(r".*\.down_proj:in", "int8:tensor"),)).resolve(CONFIG.shapes())
    with pytest.raises(InputError, match="down_proj:in: activation format int8:tensor stores its scale.*calibration"):
        r.prepare(p, static)
    q = p["model"]["layers"]["0"]["self_attn"]
    q["q_proj"] = q["q_proj"].at[1, 2].set(jnp.nan)
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj: .*weight \[1, 2\] is nan"):
        r.convert(r.prepare(p, assignment))

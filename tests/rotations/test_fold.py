"""Folding: what it refuses, what it keeps, and the states that files hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg.online import Hadamard, Kronecker
from lowbit.plan import Plan
from lowbit.ptq import rtn
from lowbit.rotations import base, fold, state_file
from lowbit.rotations.fold import State
from tests.models.tiny import tiny


def test_a_tied_head_is_untied_and_norms_become_ones():
    model = tiny("llama3")
    done = base.transform(model, "quarot:r1")
    assert model.config.tied and not done.config.tied
    flat = dict(trees.items(done.params))
    assert set(flat) == set(done.config.shapes())
    assert all((np.asarray(w) == 1).all() for p, w in flat.items() if p.endswith("norm"))
    head, embedding = np.asarray(flat["lm_head"]), np.asarray(flat["model.embed_tokens"])
    assert np.abs(head - embedding).max() > 0.1  # the final norm's scale is in one of them
    assert done.meta["transform"] == "quarot:r1"


def test_rotation_spreads_an_outlier():
    """One channel that is much larger than the others has its magnitude in all of them afterwards."""
    model = tiny()
    r1 = base.get("quarot:r1").fit(model).residual
    one_hot = np.eye(len(r1))[3]
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    assert np.abs(one_hot).max() / rms(one_hot) == pytest.approx(np.sqrt(len(r1)))
    assert np.abs(one_hot @ r1).max() / rms(one_hot @ r1) == pytest.approx(1.0)


def test_seeds_and_parts():
    model = tiny()
    a, b = (base.get(f"quarot:r1:s{i}").fit(model).residual for i in (0, 1))
    assert np.abs(a - b).max() > 0.1
    state = base.get("quarot").fit(model)
    assert state.inputs["model.layers.0.self_attn.o_proj"] == Hadamard(4, across=True)
    assert state.inputs["model.layers.2.mlp.down_proj"] == Hadamard(48)
    assert state.caches["model.layers.1.self_attn.k_cache"] == Hadamard(8) and len(state.caches) == 3
    assert len(state.heads) == 3 and state.norms


@pytest.mark.parametrize(
    "changes, name, message",
    [
        ({"num_heads": 9, "num_kv_heads": 3}, "quarot", "9 heads: no Hadamard matrix of order 9.*fallback dct"),
        ({"hidden_size": 36 + 2}, "quarot:r1", "hidden size 38: no Hadamard matrix of order 38"),
        ({"head_dim": 6}, "quarot:r3", "head dimension 6: no Hadamard matrix"),
        ({"intermediate_size": 63}, "quarot:r4:blocks", "intermediate size 63: blocks .* odd length 63"),
        ({}, "quarot:r5", "unknown key of transform 'quarot:r5' 'r5'"),
        ({}, "quarot:r1+r5", "unknown part of transform 'quarot:r1\\+r5' 'r5' \\(allowed: heads, r1, r3, r4"),
        ({}, "quarot:r1+r1", "names a part twice"),
        ({}, "quaro", "unknown transform 'quaro'; did you mean 'quarot'"),
        ({}, "smoothquant", "smoothquant without calibration text"),
        ({}, "spinquant:r3+r4", "without calibration text"),
        ({}, "smoothquant:a1.5", "'a1.5' in transform .* \\(allowed: a0 to a1\\)"),
    ],
)
def test_bad_names_and_sizes(changes: dict, name: str, message: str):
    with pytest.raises(InputError, match=message):
        base.transform(tiny("llama", **changes), name)


@pytest.mark.parametrize("fallback", ["dct", "blocks"])
def test_sizes_without_a_hadamard_matrix_have_fallbacks(fallback: str):
    model = tiny("llama", num_heads=9, num_kv_heads=3, hidden_size=36 + 2, intermediate_size=54)
    parts = "r1+heads+r4" if fallback == "dct" else "r1+r4"
    done = base.transform(model, f"quarot:{parts}:{fallback}")
    tokens = np.arange(20)[None] % 61
    np.testing.assert_allclose(done.logits(tokens), model.logits(tokens), atol=2e-4)


def test_sandwich_norms_are_refused_with_what_works():
    with pytest.raises(InputError, match="gemma2 model: norms after attention.*allowed: quarot:heads\\+r3\\+r4"):
        base.transform(tiny("gemma2"), "quarot")
    base.transform(tiny("gemma2"), "quarot:heads+r3+r4")
    with pytest.raises(InputError, match="fold them first"):
        fold.apply(tiny(), State("x", residual=np.eye(32)))
    smooth = {"model.layers.0.input_layernorm": np.full(32, 2.0)}
    with pytest.raises(InputError, match="residual stream with model.layers.0.input_layernorm smoothed"):
        fold.apply(tiny(), State("x", norms=True, residual=np.eye(32), smooth=smooth))
    tokens = np.arange(20)[None] % 61
    both = fold.apply(tiny(), State("x", norms=True, smooth=smooth))  # without a rotation, both may be
    np.testing.assert_allclose(both.logits(tokens), tiny().logits(tokens), atol=2e-4)


def test_packed_weights_are_refused_and_online_transforms_stay_through_quantization():
    model = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    plan = Plan.uniform("int4:g32")
    packed = model.replace(params=rtn.quantize(model.params, plan.resolve(model.config.shapes())))
    with pytest.raises(InputError, match="q_proj is a QTensor .*transform a model before it is quantized"):
        base.transform(packed, "quarot")
    done = base.transform(model, "quarot")
    with pytest.raises(InputError, match="o_proj is a PreparedInput"):
        base.transform(done, "quarot:heads")
    q = rtn.quantize(done.params, plan.resolve(done.config.shapes()))
    down = q["model"]["layers"]["0"]["mlp"]["down_proj"]
    assert isinstance(down, PreparedInput) and down.op == Hadamard(128) and down.w.format == formats.get("int4:g32")


# -- files ------------------------------------------------------------------------------------------------------------


def state_of(model) -> State:
    rng = np.random.default_rng(0)
    op = Kronecker(*(rng.standard_normal((n, n)).astype(np.float32) for n in (8, 6)))
    full = base.get("quarot").fit(model)
    return dataclasses.replace(
        full,
        inputs=full.inputs | {"model.layers.1.mlp.down_proj": op},
        smooth={"model.layers.0.mlp.down_proj": rng.uniform(0.5, 2, 48)},
    )


def test_a_saved_state_gives_the_same_bits(tmp_path):
    model = tiny()
    state = state_of(model)
    state_file.save(state, tmp_path / "t.safetensors")
    a = fold.apply(model, state)
    b = base.transform(model, str(tmp_path / "t.safetensors"))
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a.params, b.params))))


def test_damaged_and_foreign_state_files(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="cannot read the transform"):
        base.transform(tiny(), str(path))
    state_file.save(state_of(tiny()), path)
    with pytest.raises(InputError, match="residual stream of 32x32 \\(the model's hidden size is 64"):
        base.transform(tiny("llama", hidden_size=64), str(path))
    with pytest.raises(InputError, match="the model has others"):
        base.transform(tiny("llama", num_layers=2), str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read the transform"):
        base.transform(tiny(), str(path))
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(InputError, match="is no transform"):
        base.transform(tiny(), str(path))


def test_float64_numpy_goes_through_ops_on_the_host():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 48))
    kron = Kronecker(rng.standard_normal((8, 8)), rng.standard_normal((6, 6)))
    for op in (Hadamard(48), Hadamard(12, across=True), Hadamard(6, kind="dct"), kron):
        y = op(x)
        assert isinstance(y, np.ndarray) and y.dtype == np.float64
        np.testing.assert_allclose(y, x @ op.dense(48).T, atol=1e-12)
        np.testing.assert_allclose(op.into(x) @ op.dense(48), x, atol=1e-10)  # W T^-1 T = W
        np.testing.assert_allclose(op(jnp.asarray(x, jnp.float32)), y, atol=1e-4)
        np.testing.assert_allclose(op.inverse()(y), x, atol=1e-10)

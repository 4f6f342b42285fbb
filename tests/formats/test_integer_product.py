"""The product of integers: what trains is what an int8 kernel computes, bit for bit; the gradient passes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.activation import get_act
from lowbit.formats.base import Latent
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot import api, qdot
from lowbit.linalg.online import Hadamard

rng = np.random.default_rng(0)
W = rng.standard_t(4, (24, 64)).astype(np.float32)
X = (rng.standard_t(4, (3, 5, 64)) * 2).astype(np.float32)
G = rng.standard_normal((3, 5, 24)).astype(np.float32)


def by_numpy(leaf: PreparedInput, x: np.ndarray) -> np.ndarray:
    """int32 accumulation of int8 codes, then one float32 product with both scales: written from the description."""
    q = leaf.w if isinstance(leaf.w, base.QTensor) else leaf.w.encode()
    affine = q.format.affine(q)
    codes, scale = map(np.asarray, leaf.act.codes(jnp.asarray(x), leaf.params))
    assert np.array_equal(codes, np.rint(codes)) and np.abs(codes).max() <= 128
    total = codes.astype(np.int8).astype(np.int32) @ affine.codes.astype(np.int32).T
    return total.astype(np.float32) * (scale * affine.scale[:, 0]).astype(np.float32)


@pytest.mark.parametrize(
    "weights, inputs",
    [
        ("ternary:tensor", "int8:token:bitnet"),
        ("ternary:channel", "int4:token:bitnet"),
        ("int1:tensor", "int8:token:bitnet"),
        ("int4:channel", "int8:token"),
        ("int2:channel:midrise", "int8:lsq"),
        ("int8:tensor", "int8:tensor"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_the_integer_kernel(weights: str, inputs: str, dtype: str):
    fmt, act, x = base.get(weights), get_act(inputs), jnp.asarray(X, dtype)
    params = act.fit(np.abs(X).max((0, 1)), X.min((0, 1)))
    latent = PreparedInput(Latent(jnp.asarray(W), {}, fmt), act, None, params)
    packed = PreparedInput(latent.w.encode(), act, None, params)
    got = [jax.jit(qdot)(x, leaf) for leaf in (latent, packed)]
    want = jnp.asarray(by_numpy(packed, np.asarray(x, np.float32))).astype(dtype)
    for y in got:
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(want, np.float32))
    # Close to the product of the values, and with its gradient.
    value = np.asarray(latent.prepare(x), np.float64) @ np.asarray(latent.w.value(), np.float64).T
    # In bfloat16 the values are rounded once more than the integers.
    tolerance = 0.1 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(np.asarray(got[0], np.float64), value, rtol=tolerance, atol=tolerance)


def test_gradient_is_that_of_the_values():
    fmt, act = base.get("ternary:tensor"), get_act("int8:token:bitnet")
    latent = PreparedInput(Latent(jnp.asarray(W), {}, fmt), act)
    gx, gl = jax.jit(lambda x, l: jax.vjp(qdot, x, l)[1](jnp.asarray(G)))(jnp.asarray(X), latent)
    x_hat = np.asarray(latent.prepare(jnp.asarray(X)), np.float64).reshape(-1, 64)
    w_hat, g = np.asarray(latent.w.value(), np.float64), G.astype(np.float64).reshape(-1, 24)
    # BitNet: dX takes the quantized weight, dW the quantized input, nothing is masked.
    np.testing.assert_allclose(np.asarray(gx).reshape(-1, 64), g @ w_hat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gl.w.w, g.T @ x_hat, rtol=1e-4, atol=1e-3)


def test_transforms_come_first_and_other_grids_take_the_ordinary_product():
    act, op = get_act("int8:token"), Hadamard(64)
    w = base.get("int4:channel").encode(jnp.asarray(W))
    turned = PreparedInput(w, act, op)
    np.testing.assert_array_equal(
        jax.jit(qdot)(jnp.asarray(X), turned), by_numpy(PreparedInput(w, act), np.asarray(jax.jit(op)(jnp.asarray(X))))
    )
    for name in ("int4:g16", "int4:channel:asym", "q4_0"):  # more than one scale for a row, or a zero point
        leaf = PreparedInput(base.get(name).encode(jnp.asarray(W)), act)
        want = np.asarray(leaf.prepare(jnp.asarray(X))) @ np.asarray(leaf.w.decode()).T
        np.testing.assert_allclose(jax.jit(qdot)(jnp.asarray(X), leaf), want, rtol=1e-4, atol=1e-4)


def test_sums_that_float32_cannot_hold_are_not_taken():
    """8 bits by 8 bits: 1024 products may already leave 2^24."""
    x, w = np.ones((1, 1024), np.float32), np.ones((2, 1024), np.float32)
    leaf = PreparedInput(base.get("int8:channel").encode(jnp.asarray(w)), get_act("int8:token"))
    short = dataclasses.replace(leaf, w=base.get("int8:channel").encode(jnp.asarray(w[:, :1000])))
    assert api._integers(jnp.asarray(x), leaf) is None
    assert api._integers(jnp.asarray(x[:, :1000]), short) is not None


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0, 1.5])
def test_blend_is_exact_at_its_ends(mix: float):
    fmt, act = base.get("int4:channel"), get_act("int8:token")
    leaf = PreparedInput(Latent(jnp.asarray(W), {}, fmt, jnp.float32(mix)), act, mix=jnp.float32(mix))
    value, x = jax.jit(lambda l, x: (l.w.value(), l.prepare(x)))(leaf, X)
    q, qx = fmt.fake_quant(jnp.asarray(W), fmt.fitted(jnp.asarray(W))), act.fake_quant(jnp.asarray(X))
    if mix == 0.25:
        np.testing.assert_allclose(value, W + 0.25 * (np.asarray(q) - W), rtol=1e-6)
    else:
        np.testing.assert_array_equal(value, W if mix == 0 else q)
        np.testing.assert_array_equal(x, X if mix == 0 else qx)
    g = jax.jit(jax.grad(lambda w: Latent(w, {}, fmt, jnp.float32(mix)).value().sum()))(jnp.asarray(W))
    np.testing.assert_allclose(g, 1.0, rtol=1e-6)  # straight through at any mix

"""GPTQ against its definition, against rounding to nearest, and over every registered format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.formats.base import Format
from lowbit.formats.kquant import KQuant
from lowbit.ptq import rtn
from lowbit.ptq.gptq import gptq, quadratic_error
from lowbit.vq.codebook import Codebooks

RNG = np.random.default_rng(0)


def correlated(I, rank=None, n=512, seed=0):
    """A Hessian of inputs with a few strong directions and channels of different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, rank or I // 4)) @ rng.standard_normal((rank or I // 4, I))
    x = (x / 4 + 0.3 * rng.standard_normal((n, I))) * np.exp(0.5 * rng.standard_normal(I))
    return (2 / n * x.T @ x).astype(np.float32)


def weight(O, I, seed=1):
    return np.random.default_rng(seed).standard_normal((O, I)).astype(np.float32)


def textbook(w, h, fmt, damping=0.01):
    """The paper's algorithm in float64, one column after the other: explicit inverse, its upper Cholesky factor U,
    `W_rest -= (w - q) / U_ii U_i,rest`; parameters fitted to the updated weights where a span begins."""
    (O, I), importance = w.shape, np.diag(h)
    h = h.astype(np.float64) + damping * np.mean(importance) * np.eye(I)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    assert np.allclose(u.T @ u, np.linalg.inv(h)) and np.allclose(u, np.triu(u))
    now, out = w.astype(np.float64), np.zeros((O, I), np.float32)
    span, round_ = fmt.params_span((O, I)), jax.jit(fmt.round_block)
    for i in range(I):
        if i % span == 0:
            params = fmt.fit_block(
                jnp.asarray(now[:, i : i + span], jnp.float32), jnp.asarray(importance[i : i + span])
            )
            if isinstance(fmt, KQuant):  # a column has a sub-block's part of what a super-block stores
                params = {k: np.repeat(a, span // a.shape[1], axis=1) for k, a in fmt.stored(params).items()}
        at = params if not isinstance(fmt, KQuant) else {k: a[:, i % span][:, None] for k, a in params.items()}
        out[:, i] = round_(jnp.asarray(now[:, i : i + 1], jnp.float32), at)[1][:, 0]
        now[:, i:] -= np.outer((now[:, i] - out[:, i]) / u[i, i], u[i, i:])
    return out


def every_format():
    """All of them; by default the first name of each family, of a kind with many a few."""
    seen = set("int2 int3 int5 int6 int7 fp16 f32 q4_1 q5_0 q5_1 q2_k q3_k q5_k q6_k nf2 nf3 nuq1 nuq3 nuq4".split())
    seen |= set("aqlm gptvq e8p3 e8p4 trellis1 trellis2.5 trellis3 trellis4".split())
    for name in formats.names():
        if not formats.get(name).idempotent:
            continue
        family = name.split(":")[0]
        yield pytest.param(name, marks=[pytest.mark.slow] if family in seen else [])
        seen.add(family)


def solves(fmt, w, h, act_order=False, slack=1.0):
    """Codes are packed as chosen, the reported error is the error, and rounding to nearest is no better (by more than
    `slack`: few code words in many dimensions have no room for feedback)."""
    r = gptq(w, h, fmt, act_order=act_order)
    assert r.q.format == fmt and r.q.shape == w.shape and r.damping == 0.01 and r.dead == 0
    np.testing.assert_array_equal(np.asarray(r.q.decode()), np.asarray(r.w_hat_OI))
    exact = quadratic_error(w, r.w_hat_OI, h)
    assert exact <= slack * quadratic_error(w, rtn.encode(fmt, w).decode(), h)
    assert r.error == pytest.approx(exact, rel=2e-3, abs=1e-6 * quadratic_error(w, 0 * w, h))


@pytest.mark.parametrize("name", list(every_format()))
def test_every_format(name):
    """On correlated inputs; and where inputs are not, rounding to nearest is what GPTQ does, to the bit."""
    fmt, w = formats.get(name), weight(16, 256)
    learned = isinstance(fmt, Codebooks)
    solves(fmt, w, correlated(256), slack=1.1 if learned else 1.0)
    r = gptq(w, np.eye(256, dtype=np.float32), fmt)
    for key, a in rtn.encode(fmt, w).arrays.items():
        if learned and key == "codes":  # distances of a block and of the whole may differ in the last bit
            assert np.mean(np.asarray(r.q.codes()[0]) == np.asarray(rtn.encode(fmt, w).codes()[0])) > 0.99
        else:
            np.testing.assert_array_equal(np.asarray(r.q.arrays[key]), np.asarray(a), err_msg=key)


@pytest.mark.parametrize("name", ["int1:channel:centered", "dorefa4:channel"])
def test_formats_that_need_all_columns_are_refused(name):
    with pytest.raises(InputError, match=f"format '{name}' with solver gptq"):
        gptq(weight(8, 64), correlated(64), formats.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.values[0] for p in every_format() if not p.marks])
def test_every_family_in_act_order(name):
    fmt = formats.get(name)
    solves(fmt, weight(16, 256), correlated(256), True, 1.1 if isinstance(fmt, Codebooks) else 1.0)


@pytest.mark.parametrize(
    "name, columns", [("int4:g32", 64), ("int3:channel", 64), ("int3:g32:mse", 64), ("q4_1", 64), ("q4_k:absmax", 256)]
)
def test_equals_the_textbook(name, columns):
    """Rounding can tip where float32 and float64 differ, so a few codes may; the error may not."""
    fmt, w, h = formats.get(name), weight(24, columns), correlated(columns)
    ours, theirs = gptq(w, h, fmt).w_hat_OI, textbook(w, h, fmt)
    assert np.mean(np.asarray(ours) == theirs) > 0.98
    assert quadratic_error(w, ours, h) == pytest.approx(quadratic_error(w, theirs, h), rel=0.01)


@pytest.mark.parametrize("block", [1, 32, 1000])
def test_blocks_change_only_rounding(block):
    fmt, w, h = formats.get("int4:channel"), weight(16, 96), correlated(96)
    assert np.mean(np.asarray(gptq(w, h, fmt, block=block).w_hat_OI) == textbook(w, h, fmt)) > 0.98


def test_groups_are_fitted_to_updated_weights():
    """Weights that the error of the first group moves by more than their size: scales of the weights as they were
    (found by an H that moves nothing) clip them, and the error shows it."""
    fmt, (O, I) = formats.get("int4:g32"), (16, 64)
    w = weight(O, I)
    w[:, 32:] *= 0.02
    x = RNG.standard_normal((512, 32))
    x = np.concatenate([x, x + 0.05 * RNG.standard_normal((512, 32))], axis=1)
    h = (2 / 512 * x.T @ x).astype(np.float32)
    r = gptq(w, h, fmt)
    assert quadratic_error(w, r.w_hat_OI, h) < 0.3 * quadratic_error(w, stale(w, h, fmt), h)
    assert (
        np.mean(np.asarray(r.q.arrays["scale"])[:, 1] > 1.5 * np.asarray(rtn.encode(fmt, w).arrays["scale"])[:, 1])
        > 0.9
    )


def stale(w, h, fmt):
    """The same with the scales of the weights as they were."""
    scale = np.asarray(rtn.encode(fmt, w).arrays["scale"], np.float32)
    groups = iter(scale.T[:, :, None])

    class Beforehand:
        params_span = staticmethod(fmt.params_span)
        fit_block = staticmethod(lambda w_now, importance: {"scale": jnp.asarray(next(groups))})
        round_block = staticmethod(fmt.round_block)

    return textbook(w, h, Beforehand())


@pytest.mark.parametrize("name", ["int4:g32", "ternary:tensor"])
def test_better_than_nearest_by_a_margin(name):
    fmt, ratios = formats.get(name), []
    for seed in range(4):
        w, h = weight(16, 128, seed), correlated(128, seed=seed)
        nearest = quadratic_error(w, rtn.encode(fmt, w).decode(), h)
        ratios.append([quadratic_error(w, gptq(w, h, fmt, act_order=o).w_hat_OI, h) / nearest for o in (False, True)])
    assert np.mean(ratios, axis=0).max() < 0.5


def test_act_order_is_a_permutation_round_trip():
    """Columns that come in descending order already: nothing is permuted. Shuffled, with one scale a row, the same
    columns get the same codes."""
    fmt, w, h = formats.get("int4:channel"), weight(8, 64), correlated(64)
    order = np.argsort(-np.diag(h), kind="stable")
    w, h = w[:, order], h[order][:, order]
    sorted_ = gptq(w, h, fmt, act_order=True)
    np.testing.assert_array_equal(sorted_.w_hat_OI, gptq(w, h, fmt, act_order=False).w_hat_OI)
    mix = RNG.permutation(64)
    mixed = gptq(w[:, mix], h[mix][:, mix], fmt, act_order=True)
    np.testing.assert_array_equal(np.asarray(mixed.w_hat_OI), np.asarray(sorted_.w_hat_OI)[:, mix])
    # With groups the layout stays: scales are those of neighbouring columns, fitted to the weights as they were.
    groups = formats.get("int4:g32")
    q = gptq(w[:, mix], h[mix][:, mix], groups, act_order=True).q
    np.testing.assert_array_equal(q.arrays["scale"], rtn.encode(groups, w[:, mix]).arrays["scale"])


@dataclasses.dataclass(frozen=True)
class Pairs(Format):
    """Vectors of neighbouring columns on the lattice of integers with an even sum, times one scale a row."""

    width: int = 2

    @property
    def name(self):
        return f"even:{self.width}"

    @property
    def tile(self):
        return (1, self.width)

    def init(self, w_OI, stats=None, key=None):
        return {"scale": jnp.max(jnp.abs(w_OI), axis=1, keepdims=True) / 3}

    def stored(self, params):
        return params

    def quantize(self, w_OI, stored):
        v = rearrange(w_OI / stored["scale"], "o (k t) -> o k t", t=self.width)
        q = jnp.round(v)
        worst = jnp.argmax(jnp.abs(v - q), axis=-1)[..., None] == jnp.arange(self.width)
        moved = q + worst * jnp.where(v >= q, 1.0, -1.0)
        q = jnp.where(jnp.sum(q, axis=-1, keepdims=True) % 2 == 0, q, moved)
        return rearrange(q, "o k t -> o (k t)").astype(jnp.int32)

    def dequantize(self, codes_OI, stored):
        return codes_OI.astype(jnp.float32) * stored["scale"]

    def pack(self, codes_OI, stored):
        return {"codes": codes_OI, **stored}

    def unpack(self, arrays, shape):
        return arrays["codes"], {"scale": arrays["scale"]}


def block_ldlq(w, h, fmt, damping=0.01):
    """LDLQ by its definition in float64: `H = L D L^T`, L unit block triangular, from the Cholesky factor of the
    columns in reverse; `W_hat_k = Q(W_k + (W - W_hat) L_.k)` over the blocks before k."""
    O, I = w.shape
    t = fmt.tile[1]
    h = h.astype(np.float64) + damping * np.mean(np.diag(h)) * np.eye(I)
    c = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    assert np.allclose(c @ c.T, h) and np.allclose(c, np.triu(c))
    params, out = fmt.fit_block(jnp.asarray(w)), np.zeros((O, I))
    for k in range(0, I, t):
        at = slice(k, k + t)
        feedback = (w - out)[:, :k] @ c[:k, at] @ np.linalg.inv(c[at, at])
        out[:, at] = fmt.round_block(jnp.asarray(w[:, at] + feedback, jnp.float32), params)[1]
    return out


@pytest.mark.parametrize("width, block", [(2, 16), (4, 128)])
def test_tiles_get_block_feedback(width, block):
    fmt, w, h = Pairs(width), weight(24, 96), correlated(96)
    r = gptq(w, h, fmt, block=block)
    wanted = block_ldlq(w, h, fmt)
    assert np.mean(np.asarray(r.w_hat_OI) == wanted) > 0.97
    assert quadratic_error(w, r.w_hat_OI, h) == pytest.approx(quadratic_error(w, wanted, h), rel=0.01)
    assert r.error == pytest.approx(quadratic_error(w, r.w_hat_OI, h), rel=1e-3)
    moved = gptq(w, h, fmt, block=block, act_order=True)
    np.testing.assert_array_equal(moved.q.decode(), moved.w_hat_OI)
    codes = np.asarray(moved.q.arrays["codes"]).reshape(24, -1, width).sum(-1)
    assert (codes % 2 == 0).all()  # tiles moved as wholes


def test_dead_channels_and_damping():
    fmt, w, h = formats.get("int4:channel"), weight(8, 64), correlated(64)
    h[[3, 10]] = h[:, [3, 10]] = 0
    r = gptq(w, h, fmt)
    assert r.dead == 2 and not np.asarray(r.w_hat_OI)[:, [3, 10]].any()
    rest = np.delete(np.arange(64), [3, 10])
    alone = gptq(w[:, rest], h[rest][:, rest], fmt)
    np.testing.assert_array_equal(np.asarray(r.w_hat_OI)[:, rest], alone.w_hat_OI)
    singular = np.ones((64, 64), np.float32)
    r = gptq(w, singular, fmt, damping=0.0)
    assert 0 < r.damping <= 0.1 and np.isfinite(r.error)
    assert gptq(w, np.zeros((64, 64), np.float32), fmt).dead == 64


def test_bad_input():
    fmt, w, h = formats.get("int4:g32"), weight(8, 64), correlated(64)
    with pytest.raises(InputError, match=r"Hessian of x\.y holds NaN"):
        gptq(w, np.where(np.eye(64) == 1, np.nan, h), fmt, name="x.y")
    with pytest.raises(InputError, match=r"Hessian of x\.y has shape \[63, 63\] \(allowed: \[64, 64\]"):
        gptq(w, h[:63, :63], fmt, name="x.y")
    with pytest.raises(InputError, match=r"Hessian of x\.y is not positive definite with damping 1"):
        gptq(w, h - 1e4 * np.ones((64, 64), np.float32) * (1 - np.eye(64, dtype=np.float32)), fmt, name="x.y")
    with pytest.raises(InputError, match=r"x\.y holds NaN"):
        gptq(np.where(w > 2, np.inf, w), h, fmt, name="x.y")
    with pytest.raises(InputError, match="multiple of 32"):
        gptq(w[:, :40], h[:40, :40], fmt)

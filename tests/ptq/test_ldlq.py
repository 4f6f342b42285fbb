"""LDLQ: GPTQ in another notation, tiles of any shape, coordinate descent, rotated spaces, and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.linalg.block_ldl import block_ldl
from lowbit.ptq import base as solvers
from lowbit.ptq.gptq import gptq, quadratic_error
from lowbit.ptq.options import LdlqOptions
from lowbit.vq.incoherent import Incoherent
from tests.ptq.tiles import Tiles, correlated

O, I = 8, 48
W = np.random.default_rng(1).standard_normal((O, I)).astype(np.float32)
H = correlated(I)


def ldlq(w, h, fmt, damping=0.01):
    """`(w_hat, eta, D)` from the definition in float64: H = L D L^T, `W_hat_k = Q(W_k + (W - W_hat) L_.k)`."""
    t = fmt.tile[1]
    L, D = block_ldl(h + damping * np.mean(np.diag(h)) * np.eye(len(h)), t, upper=True)
    params, round_ = fmt.fit_block(jnp.asarray(w)), jax.jit(fmt.round_block)
    out, eta = np.zeros(w.shape), np.zeros(w.shape)
    for k in range(0, w.shape[1], t):
        at = slice(k, k + t)
        goal = w[:, at] + (w - out)[:, :k] @ L[:k, at]
        out[:, at] = round_(jnp.asarray(goal, jnp.float32), params)[1]
        eta[:, at] = goal - out[:, at]
    return out, eta, D


@pytest.mark.parametrize("fmt", [formats.get("int3:channel"), Tiles()], ids=lambda f: f.name)
def test_equals_the_definition(fmt):
    """For single columns this is GPTQ with columns in their order, of which tests/ptq/test_gptq.py says that it equals
    the paper's algorithm. The loss is `sum |eta_k D_k^(1/2)|^2`, of the damped Hessian."""
    r = gptq(W, H, fmt)
    want, eta, D = ldlq(W, H, fmt)
    assert np.mean(np.asarray(r.w_hat_OI) == want) > 0.97
    np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
    assert quadratic_error(W, r.w_hat_OI, H) == pytest.approx(quadratic_error(W, want, H), rel=0.02)
    assert r.error == pytest.approx(quadratic_error(W, r.w_hat_OI, H), rel=1e-3)
    damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(I)
    parts = eta.reshape(O, -1, fmt.tile[1])
    assert np.einsum("okg,kgh,okh->", parts, D, parts) == pytest.approx(quadratic_error(W, want, damped), rel=1e-6)


def test_codes_of_tiles_move_with_their_columns():
    fmt = Tiles()
    moved = gptq(W, H, fmt, act_order=True)
    assert moved.q.arrays["codes"].shape == (O // 2, I // 4)
    np.testing.assert_array_equal(moved.q.decode(), moved.w_hat_OI)
    order = np.argsort(-np.diag(H).reshape(-1, 4).sum(1), kind="stable")
    columns = (order[:, None] * 4 + np.arange(4)).reshape(-1)
    sorted_ = gptq(W[:, columns], H[columns][:, columns], fmt)
    # The scale is a mean over the columns in another order, so a few may tip.
    assert np.isclose(np.asarray(moved.w_hat_OI)[:, columns], sorted_.w_hat_OI, rtol=1e-5).mean() > 0.97


@pytest.mark.parametrize("fmt", [formats.get("int3:g16"), Tiles()], ids=lambda f: f.name)
def test_sweeps_are_coordinate_descent(fmt):
    """Each tile takes `Q(W_k + sum_{j != k} (W_j - W_hat_j) H_jk H_kk^-1)` where that lowers the error; never worse."""
    before, once = gptq(W, H, fmt), gptq(W, H, fmt, sweeps=1)
    more = gptq(W, H, fmt, sweeps=8)
    damped = (H + 0.01 * np.mean(np.diag(H)) * np.eye(I)).astype(np.float64)
    t, tall = fmt.tile[1], fmt.tile[0]
    out = np.asarray(before.w_hat_OI, np.float64)
    round_ = jax.jit(fmt.round_block)
    _, stored = before.q.codes()
    for k in range(0, I, t):
        at = slice(k, k + t)
        inverse = np.linalg.inv(damped[at, at])
        goal = out[:, at] + (W - out) @ damped[:, at] @ inverse
        new = np.asarray(round_(jnp.asarray(goal, jnp.float32), fmt.params_at(stored, k, I))[1], np.float64)

        def cost(hat, goal=goal, at=at):
            e = goal - hat
            return np.sum((e @ damped[at, at]) * e, axis=1).reshape(-1, tall).sum(1)

        better = np.repeat(cost(new) < cost(out[:, at]), tall)
        out[better, at] = new[better]
    assert np.mean(np.asarray(once.w_hat_OI) == out) > 0.97
    errors = [quadratic_error(W, r.w_hat_OI, damped) for r in (before, once, more)]
    assert errors[0] > errors[1] >= errors[2] and errors[2] < 0.98 * errors[0]
    for r in (once, more):
        np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
        assert r.error == pytest.approx(quadratic_error(W, r.w_hat_OI, H), rel=1e-3)


@pytest.mark.parametrize("inner", [formats.get("int2:g16"), Tiles()], ids=lambda f: f.name)
def test_rotated_formats_are_solved_in_their_space(inner):
    fmt = Incoherent(inner=inner)
    own = fmt.signs(jnp.asarray(W))
    r = gptq(W, H, fmt, sweeps=1)
    alone = gptq(jax.jit(fmt.enter)(W, own), fmt.hessian(jnp.asarray(H), own), inner, sweeps=1)
    for k, a in alone.q.arrays.items():
        np.testing.assert_array_equal(r.q.arrays[k], a)
    np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
    assert r.error == pytest.approx(quadratic_error(W, r.w_hat_OI, H), rel=1e-3)
    assert quadratic_error(W, r.w_hat_OI, H) < 0.8 * quadratic_error(W, fmt.encode(jnp.asarray(W)).decode(), H)


def test_the_error_counts_the_sizes_of_rows():
    w = W * np.geomspace(0.1, 10, len(W), dtype=np.float32)[:, None]
    r = gptq(w, H, formats.get("rht:rows:int2:g16"))
    assert r.error == pytest.approx(quadratic_error(w, r.w_hat_OI, H), rel=1e-3)


def test_rotated_formats_count_dead_channels_and_refuse_what_their_inner_does():
    h = H.copy()
    h[[3, 10]] = h[:, [3, 10]] = 0
    assert gptq(W, h, formats.get("rht:int2:g16")).dead == 2
    with pytest.raises(InputError, match="format 'rht:int1:channel:centered' with solver gptq"):
        gptq(W, H, formats.get("rht:int1:channel:centered"))
    with pytest.raises(InputError, match="Hessian of x.y holds NaN"):
        gptq(W, np.where(H > 1, np.nan, H), formats.get("rht:int2"), name="x.y")
    singular = gptq(W, np.ones((I, I), np.float32), formats.get("rht:int2:g16"), damping=0.0)
    assert 0 < singular.damping <= 0.1 and np.isfinite(singular.error)


def test_options():
    assert LdlqOptions().order == "columns" and solvers.get("ldlq").calibrates
    with pytest.raises(InputError, match=r"ldlq sweeps is -1 \(allowed: at least 0\)"):
        LdlqOptions(sweeps=-1)

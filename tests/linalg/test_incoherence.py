"""Randomized Hadamard on both sides: exact inverse, a proxy loss that stays, and weights that look normal after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.linalg.hadamard import transform
from lowbit.linalg.incoherence import incoherence, signs

RNG = np.random.default_rng(0)


def drawn(shape, trained=False):
    """Signs of both sides, or trained ones: scales of any size and sign."""
    su, sv = signs(shape[1], "in")[None], signs(shape[0], "out")[:, None]
    if trained:
        su, sv = (s * RNG.uniform(0.5, 2, s.shape).astype(np.float32) for s in (su, sv))
    return su, sv


SPACES = [((12, 16), None, "refuse"), ((256, 384), 128, "refuse"), ((24, 107), None, "dct"), ((8, 192), 128, "blocks")]


@pytest.mark.parametrize("shape, block, fallback", SPACES)
def test_both_ways_are_the_dense_products(shape, block, fallback):
    space = incoherence(shape, block, fallback)
    w = RNG.standard_normal(shape).astype(np.float32)
    enter, leave = jax.jit(space.enter), jax.jit(space.leave)
    rows, columns = space.rows.dense(), space.columns.dense()
    for trained in (False, True):
        su, sv = drawn(shape, trained)
        inside = enter(w, su, sv)
        np.testing.assert_allclose(inside, rows @ (w / sv / su) @ columns.T, atol=2e-5)
        np.testing.assert_allclose(leave(inside, su, sv), w, atol=2e-5)
        other = RNG.standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(leave(other, su, sv), sv * (rows.T @ other @ columns) * su, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(enter(w, *drawn(shape))), np.linalg.norm(w), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 12, 92, 96, 312])
def test_sums_are_the_transform(n):
    """Cores that are not symmetric among them, forwards and backwards."""
    t, x = transform(n), RNG.standard_normal((n, 3)).astype(np.float32)
    both = jax.jit(lambda x: (t.sums(x), t.sums(x, inverse=True)))(x)
    for y, dense in zip(both, (t.dense(), t.dense().T)):
        np.testing.assert_allclose(np.asarray(y) / np.sqrt(t.norm), dense @ x, atol=5e-6)


def test_proxy_loss_stays_on_both_sides():
    O, I = 24, 48
    space, (su, sv) = incoherence((O, I)), drawn((O, I))
    x, y = RNG.standard_normal((64, I)), RNG.standard_normal((64, O))
    H_I, H_O, d = x.T @ x, y.T @ y, RNG.standard_normal((O, I)).astype(np.float32)
    d_in = np.asarray(jax.jit(space.enter)(d, su, sv), np.float64)
    G_I, G_O = space.hessian(H_I, su), space.output_hessian(H_O, sv)
    assert G_I.dtype == G_O.dtype == np.float64
    d = d.astype(np.float64)
    assert np.sum((d_in @ G_I) * d_in) == pytest.approx(np.sum((d @ H_I) * d), rel=1e-5)
    assert np.sum((H_O @ d @ H_I) * d) == pytest.approx(np.sum((G_O @ d_in @ G_I) * d_in), rel=1e-5)
    np.testing.assert_allclose(space.hessian(jnp.asarray(H_I, jnp.float32), su), G_I, rtol=1e-4, atol=1e-3)
    # Scales of the inputs go along with them: x^T enters as s x, so H~ is that of T (s * x).
    su = su * RNG.uniform(0.5, 2, su.shape).astype(np.float32)
    moved = (x * su) @ space.columns.dense().T
    np.testing.assert_allclose(space.hessian(H_I, su), moved.T @ moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [None, 128])
def test_outliers_are_gone(block):
    """Kurtosis goes to a normal distribution's 3, and incoherence mu_W = max |w| sqrt(m n) / |W| to that of one."""
    w = RNG.standard_t(3, (256, 384)).astype(np.float32)
    w[:, 7] *= 30
    w[3, 5] = 500
    inside = np.asarray(jax.jit(incoherence(w.shape, block).enter)(w, *drawn(w.shape)), np.float64)

    def kurtosis(a):
        return np.mean((a - a.mean()) ** 4) / a.var() ** 2

    assert kurtosis(w.astype(np.float64)) > 100
    # A block of 128 leaves the outliers in their own block of rows and columns.
    blocks = [inside] if block is None else [inside[a : a + 128, b : b + 128] for a in (0, 128) for b in (0, 128, 256)]
    assert all(abs(kurtosis(b) - 3) < 0.5 for b in blocks)
    if block is None:
        assert np.abs(inside).max() * np.sqrt(w.size) / np.linalg.norm(w) < 2 * np.log(4 * w.size / 0.01)


def test_signs_are_those_of_the_length_and_the_side():
    a = signs(4096, "in")
    assert set(a) == {-1.0, 1.0} and abs(a.mean()) < 0.1 and a.dtype == np.float32
    assert (a == signs(4096, "in")).all() and (a != signs(4096, "out")).any() and (a != signs(4096, "in", 1)).any()
    key = jax.random.key(0)
    assert (signs(64, "in", key=key) != signs(64, "out", key=key)).any()


def test_lengths_without_a_matrix_are_refused():
    with pytest.raises(InputError, match="no Hadamard matrix of order 107"):
        incoherence((8, 107))
    with pytest.raises(InputError, match="blocks of 128 .* length 192"):
        incoherence((128, 192), 128)

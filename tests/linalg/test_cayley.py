"""Cayley SGD stays on the manifold, goes downhill, and does both exactly as its equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit.errors import InputError
from lowbit.linalg import cayley
from lowbit.linalg.hadamard import randomized


def rotation(n: int, seed: int = 0) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def off(x) -> float:
    x = np.asarray(x, np.float64)
    return float(np.abs(x @ np.swapaxes(x, -1, -2) - np.eye(x.shape[-1])).max())


def test_a_step_is_the_cayley_transform():
    x, g = rotation(12), np.random.default_rng(1).standard_normal((12, 12))
    m, lr = -g, 1e-3
    half = m @ x.T - 0.5 * x @ x.T @ m @ x.T
    w = half - half.T
    want = np.linalg.solve(np.eye(12) - lr / 2 * w, (np.eye(12) + lr / 2 * w) @ x)
    for exact in (256, 1):  # solved; fixed point
        got, along = cayley.step(jnp.asarray(x, jnp.float32), jnp.asarray(m, jnp.float32), lr, exact)
        np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(along, w @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [256, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_procrustes_and_orthogonality_after_100_steps(exact: int, momentum: float):
    """min ||A R - B|| has its solution at B = A R*; the learned R stays orthogonal within 1e-5."""
    rng = np.random.default_rng(2)
    a, goal = rng.standard_normal((64, 24)).astype(np.float32), rotation(24, 3).astype(np.float32)
    goal = goal if np.linalg.det(goal) > 0 else goal[::-1]
    start = np.eye(24, dtype=np.float32)
    tx = cayley.cayley_sgd(optax.cosine_decay_schedule(1.5, 100), momentum, exact=exact, orthonormalize=37)
    loss = lambda r: jnp.mean(jnp.square(a @ r["r"] - a @ goal))  # noqa: E731

    @jax.jit
    def step(r, state):
        value, grads = jax.value_and_grad(loss)(r)
        updates, state = tx.update(grads, state, r)
        return optax.apply_updates(r, updates), state, value

    r = {"r": jnp.asarray(start)}
    state, values = tx.init(r), []
    for _ in range(100):
        r, state, value = step(r, state)
        values.append(float(value))
    assert off(r["r"]) < 1e-5
    assert values[-1] < 0.5 * values[0]
    assert np.linalg.det(np.asarray(r["r"], np.float64)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_without_reorthonormalization_it_drifts_little():
    tx = cayley.cayley_sgd(1.5, orthonormalize=10**6)
    r = jnp.asarray(randomized(16, jax.random.key(0)), jnp.float32)
    state = tx.init(r)
    for i in range(100):
        g = jax.random.normal(jax.random.key(i), r.shape)
        updates, state = tx.update(g, state, r)
        r = r + updates
    assert 0 < off(r) < 1e-5


def test_a_zero_gradient_changes_nothing_and_a_stack_is_its_matrices():
    x = jnp.asarray(np.stack([rotation(8, i) for i in range(3)]), jnp.float32)
    tx = cayley.cayley_sgd(0.1)
    updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    assert float(jnp.abs(updates).max()) < 1e-6
    g = jax.random.normal(jax.random.key(0), x.shape)
    together, _ = tx.update(g, tx.init(x), x)
    alone = jnp.stack([tx.update(g[i], tx.init(x[i]), x[i])[0] for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_qr_keeps_determinant_and_neighbourhood():
    x = rotation(9, 5)
    x[:, 0] *= -1
    near = cayley.nearest_qr(jnp.asarray(x + 1e-4 * np.random.default_rng(0).standard_normal(x.shape), jnp.float32))
    assert off(near) < 1e-5 and np.abs(np.asarray(near) - x).max() < 1e-3
    assert np.sign(np.linalg.det(np.asarray(near))) == np.sign(np.linalg.det(x))


@pytest.mark.parametrize(
    "x, message",
    [
        (jnp.ones((3, 4)), r"float32 \[3, 4\] \(allowed: square"),
        (jnp.eye(4, dtype=jnp.bfloat16), "bfloat16"),
        (2 * jnp.eye(4), "off an orthogonal one"),
    ],
)
def test_what_is_no_orthogonal_matrix_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        cayley.cayley_sgd(0.1).init(x)
    with pytest.raises(InputError, match="momentum"):
        cayley.cayley_sgd(0.1, momentum=1.0)

"""Learned activation formats against the papers' formulas, and the laws that every format obeys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats.activation import get_act
from lowbit.formats.base import FormatError
from lowbit.formats.learned import LEARNED

# Powers of two, so that ties and the ends of the range are hit exactly.
SCALE, OFFSET = 0.25, -1.0
rng = np.random.default_rng(0)
X = np.concatenate([rng.normal(size=(2, 40)) * 3, rng.integers(-300, 300, (2, 40)) * SCALE / 2], 1).astype(np.float32)
G = rng.standard_normal(X.shape).astype(np.float32)
every = pytest.mark.parametrize("name", LEARNED)


def params(name: str) -> dict[str, jax.Array]:
    p = {"scale": jnp.float32(SCALE), "offset": jnp.float32(OFFSET)}
    return {k: p[k] for k in get_act(name).array_shapes(1)}


def published(name: str, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Value, gradient of x and of each parameter, in float64."""
    bits, x, g = int(name[3]), x.astype(np.float64), g.astype(np.float64)
    high = 2 ** (bits - 1) - 1
    if ":pact" in name:
        levels = 2**bits - 1 if ":pos" in name else high
        alpha = SCALE * levels
        low = 0.0 if ":pos" in name else -alpha
        clipped = np.clip(x, low, alpha)
        value = np.rint(clipped * levels / alpha) * alpha / levels
        inside = (x > low) & (x < alpha)
        d_alpha = np.where(x >= alpha, 1.0, np.where(x <= -alpha, -1.0, 0.0) if low < 0 else 0.0)
        return value, np.where(inside, g, 0), {"scale": (g * d_alpha).sum() * levels}  # alpha = s * levels
    n, p = (0, 2**bits - 1) if ":asym" in name else (-high - 1, high)
    b = OFFSET if ":asym" in name else 0.0
    v = (x - b) / SCALE
    inside = (v > n) & (v < p)
    d_s = np.where(inside, np.rint(v) - v, np.where(v >= p, p, n))
    grads = {"scale": (g * d_s).sum() / np.sqrt(x.shape[-1] * p)}
    if ":asym" in name:
        grads["offset"] = (g * ~inside).sum()
    return np.rint(np.clip(v, n, p)) * SCALE + b, np.where(inside, g, 0), grads


@every
def test_names_are_canonical(name: str):
    act = get_act(name)
    assert act.name == name and act.static and act.learned and get_act(name.upper()) == act


@every
def test_value_and_gradients_are_the_published_ones(name: str):
    act, p = get_act(name), params(name)

    @jax.jit
    def run(x, p):
        y, pull = jax.vjp(act.fake_quant, x, p)
        return y, *pull(jnp.asarray(G))

    y, gx, gp = run(X, p)
    value, want_x, want = published(name, X, G)
    np.testing.assert_array_equal(np.asarray(y), value.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(gx), want_x.astype(np.float32))
    assert 0.1 < np.mean(np.asarray(gx) != 0) < 1  # both kinds occur
    assert gp.keys() == want.keys() == p.keys()
    for k in want:
        np.testing.assert_allclose(gp[k], want[k], rtol=1e-4, atol=1e-4)
    assert np.count_nonzero(gx) == round(act.gradient_fraction(jnp.asarray(X), p) * X.size)


@every
def test_scale_gradient_is_the_derivative_of_the_surrogate(name: str):
    """Away from the ends, rounding replaced by adding a constant; float64 finite differences of scale and offset."""
    act, x = get_act(name), rng.normal(size=(3, 64)).astype(np.float32) * 2
    p = {k: np.float64(v) for k, v in params(name).items()}
    low, high = act.levels
    v = (x - p.get("offset", 0.0)) / p["scale"]
    assert np.abs(v - low).min() > 1e-6 and np.abs(v - high).min() > 1e-6
    shift = np.rint(v) - v

    def surrogate(q: dict) -> float:
        u = (x - q.get("offset", 0.0)) / q["scale"]
        level = np.where(v >= high, high, np.where(v <= low, low, u + shift))
        if act.rule == "pact":  # the paper's estimator: inside, alpha has no gradient
            level = np.where((v > low) & (v < high), np.rint(v) * p["scale"] / q["scale"], level)
        return float((level * q["scale"] + q.get("offset", 0.0)).sum())

    got = jax.jit(jax.grad(lambda q: act.fake_quant(jnp.asarray(x), q).sum()))(
        {k: jnp.float32(a) for k, a in p.items()}
    )
    for k in p:
        eps = 1e-6
        want = (surrogate({**p, k: p[k] + eps}) - surrogate({**p, k: p[k] - eps})) / (2 * eps)
        if k == "scale" and act.rule == "lsq":
            want /= np.sqrt(x.shape[-1] * high)
        np.testing.assert_allclose(got[k], want, rtol=1e-3, atol=1e-3)


@every
def test_train_law(name: str):
    act = get_act(name)
    flat = np.abs(X).max(0), X.max(0), X.min(0)
    p = act.fit(flat[1], flat[2], np.abs(X).mean(0))
    p["scale"] = p["scale"] * 1.0317  # not a round number
    eager = np.asarray(act.fake_quant(jnp.asarray(X), p))

    @jax.jit
    def larger(x, p, r):
        y = act.fake_quant(x * 1.0, p)
        return y, (y * r + r).sum(), jax.vmap(lambda row: act.fake_quant(row, p))(x)

    inner, _, mapped = larger(X, p, G)
    np.testing.assert_array_equal(inner, eager)
    np.testing.assert_array_equal(mapped, eager)
    assert len(np.unique(eager)) <= 2**act.bits
    half = act.fake_quant(jnp.asarray(X, jnp.bfloat16), p)
    assert half.dtype == jnp.bfloat16


def test_where_training_starts():
    high, low, mean = np.array([2.0, 6.0]), np.array([-3.0, 0.0]), np.array([0.5, 1.5])
    got = {n: get_act(n).fit(high, low, mean) for n in ("int4:lsq", "int4:lsq:r0.5", "int4:lsq:asym", "int4:pact")}
    np.testing.assert_allclose(got["int4:lsq"]["scale"], 2 * 1.0 / np.sqrt(7), rtol=1e-6)
    np.testing.assert_allclose(got["int4:lsq:r0.5"]["scale"], 3 / 7, rtol=1e-6)
    # ACIQ's 5.03 mean|x| at 4 bits, 2.83 at 2, within the range.
    np.testing.assert_allclose(list(got["int4:lsq:asym"].values()), [8.03 / 15, -3], rtol=1e-3)
    np.testing.assert_allclose(
        list(get_act("int2:lsq:asym").fit(high, low, mean).values()), [5.66 / 3, -2.83], rtol=1e-3
    )
    np.testing.assert_allclose(list(get_act("int4:lsq:asym").fit(high, low).values()), [9 / 15, -3], rtol=1e-6)
    np.testing.assert_allclose(got["int4:pact"]["scale"], 6 / 7, rtol=1e-6)
    np.testing.assert_allclose(get_act("int4:pact:pos").fit(high, low)["scale"], 6 / 15, rtol=1e-6)
    assert float(get_act("int4:lsq").fit(np.zeros(2), np.zeros(2), np.zeros(2))["scale"]) > 0


@pytest.mark.parametrize(
    "bad, message",
    [
        ("int4:lsq:pos", "pos .allowed: with pact"),
        ("int4:pact:asym", "asym .allowed: with lsq"),
        ("int9:lsq", "unknown activation format"),
        ("int4:lsq:asym:asym", "unknown activation format"),
        ("int4:lsq:r2", "clip ratio 2"),
    ],
)
def test_refusals(bad: str, message: str):
    with pytest.raises(FormatError, match=message):
        get_act(bad)
    with pytest.raises(FormatError, match="stores its offset and scale"):
        get_act("int4:lsq:asym").fake_quant(jnp.ones((2, 3)))
    with pytest.raises(FormatError, match="input .0, 1. is nan"):
        get_act("int4:lsq").fake_quant(jnp.asarray([[0.0, np.nan]]), {"scale": jnp.float32(1)})

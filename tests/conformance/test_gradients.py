"""Law 4 of `docs/architecture.md`: gradients, over every registered format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SHAPE, same_bits
from registry import NAMES, W, uniform

from lowbit.formats import base
from lowbit.formats.base import Latent
from lowbit.formats.floats import FloatFormat
from lowbit.formats.integer import Integer
from lowbit.formats.mx import MXFP4
from lowbit.formats.ternary import Ternary
from lowbit.formats.uniform import Uniform

# -- law 4: gradients -------------------------------------------------------------------------------------------------


def nearest(fmt: Uniform, u: np.ndarray) -> np.ndarray:
    """The level next to each weight on the grid without ends, half to even."""
    if not isinstance(fmt, MXFP4):
        return np.rint(u)
    levels = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 1e9])
    at = np.searchsorted(levels, np.abs(u), side="right") - 1
    below, above = levels[at], levels[at + 1]
    up = np.abs(u) - below - (above - np.abs(u))
    return np.sign(u) * np.where((up > 0) | ((up == 0) & (at % 2 == 1)), above, below)


def published(fmt: Uniform, w: np.ndarray, grid: dict[str, np.ndarray], g: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents of w and of every parameter in float64, per element, written from the papers' formulas."""
    lo, hi = fmt.levels
    wide = {k: np.repeat(np.asarray(v, np.float64), w.shape[1] // v.shape[1], axis=1) for k, v in grid.items()}
    s, z, m = wide["scale"], wide.get("zero", 0.0), wide.get("min", 0.0)
    u = (w.astype(np.float64) - m) / s
    n = w.size
    paretoq = str(fmt.clip).startswith("paretoq")
    # Qp of ParetoQ: 1, 1, 1, 3, 7 at 1, 1.58, 2, 3 and 4 bits.
    factor = 1 / np.sqrt(n * hi) if fmt.clip == "lsq" else 1.0
    if paretoq:
        factor = 1 / np.sqrt(n * {3: 3, 4: 7}.get(fmt.bits, 1))
    if isinstance(fmt, Integer) and fmt.signs:
        mask = np.ones(w.shape, bool) if fmt.clip == "none" else np.abs(u) <= 1
        return {
            "w": np.where(mask, g, 0),
            "scale": factor * g * np.where(w >= (w.mean(dtype="f8") if fmt.centered else 0), 1, -1),
        }
    if isinstance(fmt, Integer) and fmt.midrise:
        # In ParetoQ's terms: alpha = 2^b s, level = (rne(clip(w/alpha) 2^(b-1) - 1/2) + 1/2) / 2^(b-1).
        top = (hi + 1) * {"paretoq": 0.99, "lsq": hi / (hi + 1), "inclusive": hi / (hi + 1)}.get(fmt.clip, 1.0)
        mask = np.abs(u) < top if fmt.clip == "lsq" else np.abs(u) <= top
        level = np.clip(2 * np.rint(u / 2 - 0.5) + 1, lo, hi)
        passes = np.ones(w.shape, bool) if fmt.clip == "none" else mask
        return {"w": np.where(passes, g, 0), "scale": factor * g * np.where(mask, level - u, level)}
    if isinstance(fmt, Ternary) and paretoq:
        mask, end = np.abs(u) <= 1.485, 1.5 if fmt.clip == "paretoq-compat" else 1.0
        return {"w": np.where(mask, g, 0), "scale": factor * g * np.where(mask, np.rint(u) - u, end * np.sign(u))}
    r = nearest(fmt, u) + z
    masks = {
        "inclusive": (u + z >= lo) & (u + z <= hi),
        "paretoq": (u + z >= lo) & (u + z <= hi),
        "lsq": (u + z > lo) & (u + z < hi),
        "rounded": (r >= lo) & (r <= hi),
    }
    on_grid = masks.get(fmt.clip, masks["rounded"])
    passes = np.ones(w.shape, bool) if fmt.clip == "none" else masks.get(fmt.clip)
    if passes is None:
        passes = np.abs(w) < fmt.clip
    end = np.where(r > hi, hi, np.where(r < lo, lo, np.where(u + z >= hi, hi, lo))) - z  # the level of what is outside
    return {
        "w": np.where(passes, g, 0),
        "scale": factor * g * np.where(on_grid, nearest(fmt, u) - u, end),
        "zero": factor * g * np.where(on_grid, 0, -s),
        "min": factor * g * np.where(on_grid, 0, 1),
    }


def gradient_weights(fmt: Uniform) -> tuple[jax.Array, base.Params]:
    """Weights, with parameters on powers of two so that many lie exactly on the grid's ends and on rounding ties."""
    w = jnp.asarray(W["ties"])
    params = base._init(fmt, w)
    params = {**params, "scale": jnp.full(params["scale"].shape, 2.0**-5, jnp.float32)}
    if "zero" in params:
        params["zero"] = jnp.full(params["zero"].shape, 1.0 if fmt.levels[1] <= 3 else 5.0)
    if "min" in params:
        params["min"] = jnp.full(params["min"].shape, -(2.0**-4), jnp.float32)
    return w, params


@uniform
def test_gradient_law(name: str):
    """The published cotangents, reaching the declared fraction of the weights, of a value that is the encoded one."""
    fmt = base.get(name)
    g = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)

    @jax.jit
    def run(w, params):
        value, pull = jax.vjp(fmt.fake_quant, w, params)
        return value, *pull(jnp.asarray(g)), fmt.grid(fmt.stored(params))

    normal = jnp.asarray(W["normal"])
    for w, params in (gradient_weights(fmt), (normal, base._init(fmt, normal))):
        value, gw, gp, grid = run(w, params)
        assert same_bits(value, fmt.encode(w, params).decode())
        want = published(fmt, np.asarray(w), {k: np.asarray(v) for k, v in grid.items()}, g)
        np.testing.assert_array_equal(gw, want["w"].astype(np.float32))
        assert (g != 0).all() and np.count_nonzero(gw) == round(fmt.gradient_fraction(w, params) * w.size)
        assert gp.keys() == params.keys()
        for k, got in gp.items():
            each = want[k].reshape(SHAPE[0], -1, fmt.group(SHAPE))
            total = each.sum(axis=(0, 2) if fmt.granularity == "tensor" else 2, keepdims=True)[..., 0]
            np.testing.assert_allclose(got, total, rtol=1e-4, atol=2e-4 * np.abs(each).max())
    # The last weights are fitted ones: most lie inside of every policy's range, and all where there is none.
    share = np.count_nonzero(gw) / gw.size
    assert share == 1 if fmt.clip in ("none", 2.0) else 0.5 < share < 1 or fmt.clip == "rounded"
    assert fmt.gradient_fraction(normal) == fmt.gradient_fraction(normal, params)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(base.get(n), FloatFormat)])
def test_gradient_of_floats_is_the_identity(name: str):
    fmt, w = base.get(name), jnp.asarray(W["mixed"])
    assert (jax.grad(lambda w: Latent(w, {}, fmt).value().sum())(w) == 1).all() and fmt.gradient_fraction(w) == 1


SURROGATES = """int4:g64 int3:tensor:lsq int4:g64:asym ternary:channel ternary:channel:paretoq
int2:g64:midrise:paretoq q4_1 q2_0 q4_k:absmax q6_k:absmax:fixed2 mxfp4""".split()


@pytest.mark.parametrize("name", SURROGATES)
def test_scale_gradient_is_the_derivative_of_the_surrogate(name: str):
    """Straight-through replaces rne(v) by v plus a constant; its derivative by finite differences in float64."""
    fmt, w = base.get(name), W["normal"].astype(np.float64)
    params = {k: np.asarray(v, np.float64) for k, v in fmt.init(jnp.asarray(W["normal"])).items()}
    params["scale"] = params["scale"] * (0.5 if isinstance(fmt, MXFP4) else 0.9)
    grid = fmt.grid(fmt.stored(jax.tree.map(jnp.float32, params)))
    stored = {k: np.asarray(v, np.float64) for k, v in grid.items()}
    lo, hi = fmt.levels
    group = fmt.group(SHAPE)

    def parts(p):
        wide = {k: np.repeat(v, group, axis=1) for k, v in p.items()}
        return wide["scale"], wide.get("zero", 0.0), wide.get("min", 0.0)

    s0, z0, m0 = parts(stored)
    u = (w - m0) / s0
    # Which branch of the clip an element is on: (value to compare, its bound at either end).
    level0 = nearest(fmt, u)
    at, low, high = (u + z0 if fmt.clip == "lsq" else level0 + z0), lo, hi
    if fmt.clip == "paretoq":
        bound = 1.485 if fmt.levels == (-1, 1) else 0.99 * (hi + 1)
        at, low, high = u, -bound, bound
        level0 = np.rint(u) if fmt.levels == (-1, 1) else np.clip(2 * np.rint(u / 2 - 0.5) + 1, lo, hi)
    assert np.abs(u + z0 - low).min() > 1e-6 and np.abs(u + z0 - high).min() > 1e-6

    def surrogate(p) -> np.ndarray:
        s, z, m = parts(p)
        level = np.where(at < low, lo, np.where(at > high, hi, (w - m) / s + (level0 - u) + z))
        return (level - z) * s + m

    g = np.random.default_rng(4).standard_normal(SHAPE)
    got = jax.jit(jax.grad(lambda p: (fmt.fake_quant(jnp.asarray(W["normal"]), p) * g.astype(np.float32)).sum()))(
        jax.tree.map(jnp.float32, stored)
    )
    axis = (0, 2) if fmt.granularity == "tensor" else 2
    for k in stored:
        eps = 1e-7 * np.abs(stored[k]).max()
        up, down = ({**stored, k: stored[k] + e} for e in (eps, -eps))
        each = (g * (surrogate(up) - surrogate(down)) / (2 * eps)).reshape(SHAPE[0], -1, group)
        want = each.sum(axis=axis, keepdims=True)[..., 0] * fmt.grad_factor(SHAPE)
        np.testing.assert_allclose(got[k], want, rtol=2e-3, atol=1e-3 * np.abs(each).max())


def test_dynamic_parameters_get_no_gradient_and_learned_ones_do():
    fmt, w = base.get("int4:g64:clip"), jnp.asarray(W["normal"])
    learned = jax.jit(jax.grad(lambda l: jnp.square(l.value()).sum()))(Latent(w, base._init(fmt, w), fmt))
    assert (np.abs(np.asarray(learned.params["scale"])) > 0).all()
    dynamic = jax.jit(jax.grad(lambda l: l.value().sum()))(Latent(w, {}, fmt))
    assert dynamic.params == {} and set(np.unique(dynamic.w)) <= {0.0, 1.0}  # nothing leaks through the absmax

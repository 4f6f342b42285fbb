"""The same laws over every activation format: the input of a linear, quantized dynamically, one scale per token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import same_bits, weights

from lowbit.formats.base import FormatError
from lowbit.formats.fake_quant import ACTS, TokenInt, get_act

SHAPE = (2, 4, 77)  # an odd number of features
every = pytest.mark.parametrize("name", ACTS)
# The gradient policies share their forward pass with the formats that have none.
forward = pytest.mark.parametrize("name", [n for n in ACTS if get_act(n).clip == "none"])


def inputs() -> dict[str, np.ndarray]:
    """The weights' battery as activations, and outliers in a few features, as in real ones."""
    out = {k: 50 * w[:, : SHAPE[-1]].reshape(SHAPE) for k, w in weights().items() if k != "huge"}
    outliers = 0.5 * np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    outliers[..., 7] *= 300
    return {**out, "outliers": outliers}


X = inputs()


@functools.cache
def compiled(act: TokenInt):
    """Value and gradient alone, and inside of a program that consumes the value twice."""

    def larger(x, r):
        y = act.fake_quant(x * 1.0)
        return y, (y * r + r).sum(), (y + r).max()

    return jax.jit(lambda x, g: (lambda y, pull: (y, pull(g)[0]))(*jax.vjp(act.fake_quant, x))), jax.jit(larger)


# A token's numbers in float64, written from the formulas: `(x in codes, value of a code, lowest and highest code)`.
def published(act: TokenInt, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    x, half = x.astype(np.float64), 2 ** (act.width - 1)
    if act.bitnet and act.width == 4:  # a4.8: beta / sqrt(7) * clip(rne(sqrt(7) / (beta + eps) * x), -8, 7)
        beta = np.abs(x).mean(-1, keepdims=True)
        return x * np.sqrt(7) / (beta + 1e-5), beta / np.sqrt(7), -8, 7
    top = np.abs(x).max(-1, keepdims=True)
    step = np.maximum(top, 1e-5 if act.bitnet else 1e-30) / (half - 1)
    return x / step, step, -half, half - 1


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_canonical_and_parse_back():
    assert len(set(ACTS)) == len(ACTS) and {get_act(n).clip for n in ACTS} == {"none", "inclusive", "rounded", 2.0}
    for name in ACTS:
        act = get_act(name)
        assert act.name == name and get_act(f" {name.upper()} ") == act and hash(get_act(name)) == hash(act)
    assert get_act("int4:token:bitnet:fixed0.50").name == "int4:token:bitnet:fixed0.5"


@pytest.mark.parametrize("bad", ["int8", "int7:token", "int8:token:foo", "int8:tokens", "int8:token:clip:bitnet", ""])
def test_unknown_names_are_refused(bad: str):
    with pytest.raises(FormatError, match=f"unknown activation format '{bad}'.*allowed: int4:token") as e:
        get_act(bad)
    assert "\n" not in str(e.value)


# -- law 1: the same bits eager, jitted and inside of a larger program -------------------------------------------------


@forward
def test_train_law(name: str):
    act = get_act(name)
    alone, larger = compiled(act)
    for what, x in X.items():
        eager = act.fake_quant(jnp.asarray(x))
        assert eager.dtype == jnp.float32 and np.isfinite(eager).all(), what
        assert same_bits(alone(x, np.ones_like(x))[0], eager), what
        assert same_bits(larger(x, X["normal"])[0], eager), what
        codes, step, lo, hi = published(act, x)
        got = np.asarray(eager, np.float64)
        want = np.clip(np.rint(codes), lo, hi) * step
        far = np.abs(codes - np.floor(codes) - 0.5) > 1e-3  # a tie in float64 may be none in float32
        np.testing.assert_allclose(got[far], want[far], rtol=1e-5, atol=1e-37, err_msg=what)
        assert (np.abs(got - want) <= 1.001 * step).all(), what
    half = jnp.asarray(X["normal"], jnp.bfloat16)
    assert same_bits(act.fake_quant(half), act.fake_quant(half.astype(jnp.float32)).astype(jnp.bfloat16))


# -- law 4: gradients -------------------------------------------------------------------------------------------------


@every
def test_gradient_law(name: str):
    act, x = get_act(name), X["heavy"]
    g = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    value, got = map(np.asarray, compiled(act)[0](x, g))
    assert same_bits(value, compiled(dataclasses.replace(act, clip="none"))[0](x, g)[0])
    codes, _, lo, hi = published(act, x)
    masks = {
        "none": np.ones(SHAPE, bool),
        "inclusive": (codes >= lo) & (codes <= hi),
        "rounded": (np.rint(codes) >= lo) & (np.rint(codes) <= hi),
        2.0: np.abs(x) < 2,
    }
    np.testing.assert_array_equal(got, np.where(masks[act.clip], g, 0))
    assert (g != 0).all() and np.count_nonzero(got) == round(act.gradient_fraction(jnp.asarray(x)) * x.size)
    if act.clip == "inclusive" or act.clip == 2.0:
        assert np.count_nonzero(got) < x.size
    else:  # absmax leaves nothing outside
        assert np.count_nonzero(got) == x.size


# -- law 7: shapes ----------------------------------------------------------------------------------------------------


@forward
def test_shape_law(name: str):
    act, x = get_act(name), jnp.asarray(X["normal"])
    want, traces = act.fake_quant(x), []

    @jax.jit
    def run(x):
        traces.append(0)
        _, scanned = jax.lax.scan(lambda c, row: (c, act.fake_quant(row)), 0, x)
        return jax.vmap(act.fake_quant)(x), scanned, jax.checkpoint(act.fake_quant)(x)

    for got in run(x):
        assert same_bits(got, want)
    run(x * 2)
    assert len(traces) == 1


@forward
@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 2, 3, 7)])
def test_a_token_is_the_last_axis_of_any_shape(name: str, shape: tuple[int, ...]):
    y = np.asarray(jax.jit(get_act(name).fake_quant)(jnp.full(shape, 0.75)))
    assert y.shape == shape and (y == y.flat[0]).all() and abs(y.flat[0] - 0.75) < 0.15


# -- law 8: refusals --------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float):
    act, x = get_act(name), X["normal"].copy()
    x[1, 2, 3] = bad
    with pytest.raises(FormatError, match=rf"{name}: input \[1, 2, 3\] is {bad} \(must be finite\)"):
        act.fake_quant(jnp.asarray(x))
    jitted = np.isnan(compiled(act)[0](x, x)[0])  # nothing can raise there: the token is lost, and no other
    assert jitted[1, 2].all() and jitted.sum() == SHAPE[-1]


@every
def test_inputs_without_features_are_refused(name: str):
    act = get_act(name)
    for f in (act.fake_quant, jax.jit(act.fake_quant), lambda x: act.check(())):
        with pytest.raises(FormatError, match=rf"{name}: input of shape \(.*\) \(must be \[..., features\]"):
            f(jnp.zeros((3, 0)))

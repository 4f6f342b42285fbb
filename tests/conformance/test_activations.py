"""The same laws over every activation format: the input of a linear, quantized per token, in groups, or statically."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from battery import same_bits, weights

from lowbit.formats.activation import ACTS, ActFormat, get_act
from lowbit.formats.base import FormatError
from lowbit.formats.fake_quant import PreparedInput

SHAPE = (2, 4, 128)
ODD = 77  # features, for formats without groups
every = pytest.mark.parametrize("name", ACTS)
# The gradient policies share their forward pass with the formats that have none.
forward = pytest.mark.parametrize("name", [n for n in ACTS if get_act(n).clip == "none"])


@functools.cache
def inputs(features: int) -> dict[str, np.ndarray]:
    """The weights' battery as activations, and outliers in a few features, as in real ones."""
    shape = (*SHAPE[:2], features)
    out = {k: 50 * w[:8, :features].reshape(shape) for k, w in weights().items() if k != "huge"}
    outliers = 0.5 * np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    outliers[..., 7] *= 300
    return {**out, "outliers": outliers, "positive": np.abs(outliers)}


def battery(act: ActFormat) -> dict[str, np.ndarray]:
    return inputs(SHAPE[-1] if act.group else ODD)


def fitted(act: ActFormat, x: np.ndarray) -> dict[str, jax.Array]:
    """The stored arrays, from what calibration gives for each feature."""
    flat = x.reshape(-1, x.shape[-1])
    return act.fit(flat.max(0), flat.min(0)) if act.grid.asym else act.fit(np.abs(flat).max(0))


@functools.cache
def compiled(act: ActFormat):
    """Value and gradient alone, and inside of a program that consumes the value twice."""

    def larger(x, params, r):
        y = act.fake_quant(x * 1.0, params)
        return y, (y * r + r).sum(), (y + r).max()

    def alone(x, params, g):
        y, pull = jax.vjp(lambda x: act.fake_quant(x, params), x)
        return y, pull(g)[0]

    return jax.jit(alone), jax.jit(larger)


# The numbers in float64, written from the formulas: `(x in codes, value of a code, zero, lowest and highest code)`.
def published(act: ActFormat, x: np.ndarray, params: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    x, grid, half = x.astype(np.float64), act.grid, 2 ** (act.grid.width - 1)
    rows = x.reshape(*x.shape[:-1], -1, act.group) if act.group else x.reshape(1, -1) if act.static else x
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    top, zero = np.maximum(high, -low), np.zeros_like(low)
    if act.bitnet and grid.width == 4:  # a4.8: beta / sqrt(7) * clip(rne(sqrt(7) / (beta + eps) * x), -8, 7)
        beta = np.abs(x).mean(-1, keepdims=True)
        return x * np.sqrt(7) / (beta + 1e-5), beta / np.sqrt(7), zero, -8, 7
    ends = (-448.0, 448.0) if grid.fp8 else (0, 2 * half - 1) if grid.asym else (-half, half - 1)
    if grid.asym:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        top = high - low
        step = grid.ratio * np.maximum(top, 1e-30) / ends[1]
        exact = np.clip(-grid.ratio * low / step, *ends)
        zero = np.float64(params["zero"]) + np.zeros_like(low) if act.static else np.rint(exact)
        assert (np.abs(zero - exact) <= 0.5001).all()
    else:
        step = grid.ratio * np.maximum(top, 1e-5 if act.bitnet else 1e-30) / ends[1]
    full = lambda a: np.broadcast_to(a, rows.shape).reshape(x.shape)  # noqa: E731
    if act.static:
        np.testing.assert_allclose(params["scale"], step.item(), rtol=1e-6)
    return x / full(step), full(step), full(zero), *ends


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest saturated value, by another library."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_canonical_and_parse_back():
    assert len(set(ACTS)) == len(ACTS) and {get_act(n).clip for n in ACTS} == {"none", "inclusive", "rounded", 2.0}
    for name in ACTS:
        act = get_act(name)
        assert act.name == name and get_act(f" {name.upper()} ") == act and hash(get_act(name)) == hash(act)
    assert get_act("int4:token:bitnet:fixed0.50").name == "int4:token:bitnet:fixed0.5"
    assert get_act("int4:token:clip:r0.90:asym:g64").name == "int4:token:g64:asym:r0.9:clip"
    assert (
        get_act("int8:tensor:r1").name == "int8:tensor" and get_act("int5:token:r0.123456789").grid.ratio == 0.123456789
    )
    assert get_act("int5:token:r0.123456789").name == "int5:token:r0.123456789"
    assert get_act("int8:token:fixed0.00001").name == "int8:token:fixed0.00001"


@pytest.mark.parametrize(
    "bad", ["int8", "int9:token", "int8:token:foo", "int8:tokens", "int8:token:g0", "fp8:token:", ""]
)
def test_unknown_names_are_refused(bad: str):
    with pytest.raises(FormatError, match=f"unknown activation format '{bad}'.*allowed: fp8:tensor") as e:
        get_act(bad)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("int4:token:asym:asym", "asym and asym .*one of them"),
        ("int4:token:clip:fixed2", "clip and fixed2"),
        ("int4:token:r1.5", "clip ratio 1.5 .*0.1 to 1"),
        ("int4:token:r0", "clip ratio 0 "),
        ("fp8:token:asym", "asym .*integers"),
        ("fp8:token:rounded", "rounded .*fp8: clip, fixedC"),
        ("int8:tensor:g64", "g64 .*with token"),
        ("int4:token:bitnet:asym", "bitnet .*int8:token:bitnet"),
        ("int6:token:bitnet", "bitnet .*int8:token:bitnet"),
        ("int8:tensor:bitnet", "bitnet"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(bad: str, message: str):
    with pytest.raises(FormatError, match=f"activation format '{bad}': {message}"):
        get_act(bad)


# -- law 1: the same bits eager, jitted and inside of a larger program -------------------------------------------------


@forward
def test_train_law(name: str):
    act = get_act(name)
    alone, larger = compiled(act)
    X = battery(act)
    for what, x in X.items():
        params = fitted(act, x)
        eager = act.fake_quant(jnp.asarray(x), params)
        assert eager.dtype == jnp.float32 and np.isfinite(eager).all(), what
        assert same_bits(alone(x, params, np.ones_like(x))[0], eager), what
        assert same_bits(larger(x, params, X["normal"])[0], eager), what
        if what == "ties" and act.static:  # a constant of the program
            assert same_bits(jax.jit(lambda x, p=params: act.fake_quant(x, p))(x), eager)
        codes, step, zero, lo, hi = published(act, x, params)
        got = np.asarray(eager, np.float64)
        if act.grid.fp8:
            far = e4m3(codes * (1 - 1e-5)) == e4m3(codes * (1 + 1e-5))
            ulp = np.maximum(2.0 ** (np.frexp(np.minimum(np.abs(codes), hi))[1] - 4), 2.0**-9)
            want, one = e4m3(codes) * step, step * ulp
        else:
            far = np.abs(codes - np.floor(codes) - 0.5) > 1e-3  # a tie in float64 may be none in float32
            want, one = (np.clip(np.rint(codes) + zero, lo, hi) - zero) * step, step
        if act.top is not None:
            size = np.abs(x)
            last = -np.sort(-size, axis=-1)[..., -(-x.shape[-1] * act.top // 100) - 1, None]
            want, far = np.where(size < last, 0.0, want), far | (size < last)
        np.testing.assert_allclose(got[far], want[far], rtol=1e-5, atol=1e-37, err_msg=what)
        assert (np.abs(got - want) <= 1.001 * one).all(), what
    half, params = jnp.asarray(X["normal"], jnp.bfloat16), fitted(act, X["normal"])
    wide = act.fake_quant(half.astype(jnp.float32), params)
    assert same_bits(act.fake_quant(half, params), wide.astype(jnp.bfloat16))


# -- law 4: gradients -------------------------------------------------------------------------------------------------


@every
def test_gradient_law(name: str):
    act = get_act(name)
    x = battery(act)["heavy"]
    params = fitted(act, x)
    g = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    value, got = map(np.asarray, compiled(act)[0](x, params, g))
    assert same_bits(value, compiled(dataclasses.replace(act, clip="none"))[0](x, params, g)[0])
    codes, _, zero, lo, hi = published(act, x, params)
    codes32 = np.asarray(act.ratio(act.grouped(jnp.asarray(x)), params)[0] + 0, np.float64).reshape(x.shape)
    np.testing.assert_allclose(codes32, codes, rtol=1e-5)  # what touches the ends is decided in float32
    masks = {
        "none": np.ones(x.shape, bool),
        "inclusive": (codes32 + zero >= lo) & (codes32 + zero <= hi),
        "rounded": (np.rint(codes) >= lo) & (np.rint(codes) <= hi),
        2.0: np.abs(x) < 2,
    }
    np.testing.assert_array_equal(got, np.where(masks[act.clip], g, 0))
    assert (g != 0).all() and np.count_nonzero(got) == round(act.gradient_fraction(jnp.asarray(x), params) * x.size)
    if act.grid.ratio < 1 and act.clip == "inclusive" or act.bitnet and act.clip == "inclusive" or act.clip == 2.0:
        assert np.count_nonzero(got) < x.size
    else:  # absmax leaves nothing outside
        assert np.count_nonzero(got) == x.size
    zeros = jax.grad(lambda p: act.fake_quant(jnp.asarray(x), p).sum())(params)
    assert all((np.asarray(v) == 0).all() for v in zeros.values())


# -- law 7: shapes ----------------------------------------------------------------------------------------------------


@forward
def test_shape_law(name: str):
    act = get_act(name)
    x = jnp.asarray(battery(act)["normal"])
    params = fitted(act, np.asarray(x))
    want, traces = act.fake_quant(x, params), []

    @jax.jit
    def run(x, params):
        traces.append(0)
        f = lambda x: act.fake_quant(x, params)  # noqa: E731
        _, scanned = jax.lax.scan(lambda c, row: (c, f(row)), 0, x)
        return jax.vmap(f)(x), scanned, jax.checkpoint(f)(x)

    for got in run(x, params):
        assert same_bits(got, want)
    run(x * 2, params)
    assert len(traces) == 1


@forward
@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 2, 3, 7)])
def test_a_token_is_the_last_axis_of_any_shape(name: str, shape: tuple[int, ...]):
    act = get_act(name)
    shape = (*shape[:-1], shape[-1] * (act.group or 1))
    x = jnp.full(shape, 0.75)
    y = np.asarray(jax.jit(act.fake_quant)(x, fitted(act, np.asarray(x))))
    assert y.shape == shape and (y == y.flat[0]).all() and abs(y.flat[0] - 0.75 * act.grid.ratio) < 0.15


@forward
@pytest.mark.parametrize("value", [0.0, 1e-38, -3.5, 6e4])
def test_constant_groups_are_no_nan(name: str, value: float):
    act = get_act(name)
    x = np.full(SHAPE, value, np.float32)
    y = np.asarray(act.fake_quant(jnp.asarray(x), fitted(act, x)))
    assert np.isfinite(y).all() and (y == y.flat[0]).all()
    # bitnet's floor of 1e-5 is seen at no value here; its int4 clips nothing of a constant but rounds sqrt(7) to 3.
    np.testing.assert_allclose(y, value * act.grid.ratio, rtol=0.15, atol=1e-30)


# -- law 8: refusals --------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float):
    act = get_act(name)
    x = battery(act)["normal"].copy()
    params = fitted(act, x)
    x[1, 2, 3] = bad
    with pytest.raises(FormatError, match=rf"{name}: input \[1, 2, 3\] is {bad} \(must be finite\)"):
        act.fake_quant(jnp.asarray(x), params)
    jitted = np.isnan(compiled(act)[0](x, params, x)[0])  # nothing can raise there: what shares its scale is lost
    lost = 1 if act.static else act.group or x.shape[-1]
    assert jitted[1, 2, 3:4].all() and jitted[1, 2, :lost].sum() == (lost if lost > 3 else 0) and jitted.sum() == lost


@every
def test_inputs_without_features_are_refused(name: str):
    act = get_act(name)
    params = fitted(act, np.ones(SHAPE, np.float32))
    for f in (act.fake_quant, jax.jit(act.fake_quant), lambda x, p: act.check(())):
        with pytest.raises(FormatError, match=rf"{name}: input of shape \(.*\) \(must be \[..., features\]"):
            f(jnp.zeros((3, 0)), params)


def test_groups_that_do_not_divide_are_refused():
    for f in (lambda a: a.check((2, 77)), lambda a: a.fake_quant(jnp.ones((2, 77)))):
        with pytest.raises(FormatError, match="int4:token:g64: input of 77 features .*multiples of 64"):
            f(get_act("int4:token:g64"))


@pytest.mark.parametrize("name", [n for n in ACTS if get_act(n).static])
def test_a_static_scale_has_to_be_given(name: str):
    act, w = get_act(name), jnp.ones((3, 8))
    assert act.array_shapes(8) == {k: () for k in fitted(act, np.ones(8, np.float32))}
    for f in (lambda: act.fake_quant(w), lambda: PreparedInput(w, act)):
        with pytest.raises(FormatError, match=rf"{name} stores its scale.*calibration") as e:
            f()
        assert name.replace("tensor", "token") in str(e.value)
    with pytest.raises(FormatError, match="calibration range -inf to inf"):
        act.fit(np.full(8, np.inf))
    leaf = PreparedInput(w, act, None, act.fit(np.full(8, 2.0)))
    assert np.isfinite(jax.jit(lambda leaf, x: leaf.prepare(x))(leaf, w)).all()
    assert jax.tree.map(lambda a: None, leaf).params["scale"] is None  # jax may rebuild it around anything
    with pytest.raises(FormatError, match=r"int8:token: arrays \['scale'.*allowed: \[\]"):
        get_act("int8:token").fake_quant(w, leaf.params)

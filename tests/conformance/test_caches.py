"""The same laws over every cache format, and what an independent numpy says of the stored bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit.formats.base import FormatError
from lowbit.formats.kv import KV_FORMATS, get_kv

B, T, K, D = 2, 64, 2, 64
NAMES = [*KV_FORMATS, "int5:token:g16", "int4:token", "int7:channel:g8:r0.9", "fp8:channel:g16", "fp8:token:g8:r0.5"]
X = np.random.default_rng(0).standard_normal((B, T, K, D)).astype(np.float32)
X[..., 3] *= 40  # an outlier channel
X[0, 5:9] = 0.0
X[1, 2] = 1e-9


def test_names_are_canonical_and_parse_back():
    for name in NAMES:
        fmt = get_kv(name)
        assert fmt.name == name and get_kv(f" {name.upper()} ") == fmt and hash(get_kv(name)) == hash(fmt)
    assert get_kv("int4").name == "int4:token" and get_kv("int8:w0").name == "int8:token"
    assert get_kv("int2:channel:w64:asym").name == "int2:channel:g32:asym:w64"
    assert get_kv("int4:r0.950:asym:g64").name == "int4:token:g64:asym:r0.95"


@pytest.mark.parametrize(
    "bad, message",
    [
        ("int9", "unknown cache format 'int9'"),
        ("int4:tensor", "unknown cache format"),
        ("int4:token:clip", "unknown cache format"),
        ("int4:w8:w16", "w8 and w16 .*one of them"),
        ("int4:r2", "clip ratio 2 "),
        ("fp8:asym", "asym .*integers"),
        ("int2:channel:g32:w100", "'int2:channel:g32:w100': window of 100 tokens .*multiples of the group, 32"),
        ("int2:channel:w16", "window of 16 tokens .*32"),
    ],
)
def test_refusals(bad, message):
    with pytest.raises(FormatError, match=message) as e:
        get_kv(bad)
    assert "\n" not in str(e.value)


def test_groups_that_do_not_divide_the_head_are_refused():
    for f in (lambda f: f.check(48), lambda f: f.fake_quant(jnp.ones((1, 2, 1, 48)))):
        with pytest.raises(FormatError, match="int4:token:g32: heads of 48 values .*multiples of 32"):
            f(get_kv("int4:token:g32"))


def oracle(name: str, x: np.ndarray) -> np.ndarray:
    """Quantized and dequantized group by group, in float64 from the stored scale on."""
    fmt = get_kv(name)
    grid, n, b = fmt.grid, 2.0**fmt.grid.width, fmt.grid.width
    out = np.empty_like(x, np.float64)
    for i in np.ndindex(x.shape[0]):
        for h in range(K):
            step = fmt.tokens if fmt.channel else fmt.group or D
            groups = (
                [np.s_[t : t + step, h, d] for t in range(0, x.shape[1], step) for d in range(D)]
                if fmt.channel
                else [np.s_[t, h, d : d + step] for t in range(x.shape[1]) for d in range(0, D, step)]
            )
            for g in groups:
                v = x[i][g].astype(np.float64)
                lo, hi, top = min(v.min(), 0), max(v.max(), 0), np.abs(v).max()
                wide = grid.ratio * ((hi - lo) / (n - 1) if grid.asym else top / (448 if grid.fp8 else n / 2 - 1))
                s = max(np.float64(np.float16(np.float32(wide))), 2.0**-24)
                if grid.fp8:
                    r = (
                        np.clip(v / s, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
                        * s
                    )
                elif grid.asym:
                    z = np.clip(np.rint(-grid.ratio * lo / s), 0, n - 1)
                    r = (np.clip(np.rint(v / s) + z, 0, n - 1) - z) * s
                else:
                    r = np.clip(np.rint(v / s), -(2 ** (b - 1)), 2 ** (b - 1) - 1) * s
                out[i][g] = r
    return out


@pytest.mark.parametrize("name", NAMES)
def test_stored_bits_are_what_numpy_says(name):
    fmt = get_kv(name)
    y = np.asarray(fmt.fake_quant(jnp.asarray(X)))
    want = oracle(name, X)
    wrong = np.abs(y - want) > 1e-6 + 1e-5 * np.abs(want)  # ties of float64 that are none in float32
    assert wrong.mean() < 1e-3 and np.isfinite(y).all()
    np.testing.assert_array_equal(y[0, 5:9] if not fmt.channel else y[0, 5:9] * 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_encode_is_fake_quant_bit_for_bit_and_bits_are_counted(name):
    fmt = get_kv(name)
    blocks = jnp.asarray(X).reshape(B, T // fmt.tokens, fmt.tokens, K, D)
    arrays = fmt.encode(blocks)
    assert {k: str(a.dtype) for k, a in arrays.items()} == {
        k: d for k, d in (("codes", "uint8"), ("scale", "float16"), ("zero", "uint8")) if k in arrays
    }
    assert ("zero" in arrays) == fmt.grid.asym
    eager = fmt.fake_quant(jnp.asarray(X))
    for got in (fmt.decode(arrays, K, D), jax.jit(lambda a: fmt.decode(fmt.encode(a), K, D))(blocks)):
        assert np.asarray(got).tobytes() == np.asarray(eager).tobytes()
    assert np.asarray(jax.jit(fmt.fake_quant)(X)).tobytes() == np.asarray(eager).tobytes()
    spare = 8 * sum(a.nbytes for a in arrays.values()) / X.size - fmt.bits(D)
    assert 0 <= spare <= (8 - K * fmt.grid.width % 8) % 8 / (fmt.tokens * K * D) * fmt.grid.asym  # zeros fill a byte


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1e-12, -2.5, 3e4])
def test_constant_groups_are_no_nan(name, value):
    fmt = get_kv(name)
    y = np.asarray(fmt.fake_quant(jnp.full((1, fmt.tokens, K, D), value)))
    np.testing.assert_allclose(y, value * fmt.grid.ratio, rtol=0.07, atol=1e-6)


def test_the_gradient_is_straight_through():
    g = jax.grad(lambda x: (get_kv("int2:channel:asym").fake_quant(x) * X).sum())(jnp.asarray(X))
    np.testing.assert_array_equal(g, X)


@pytest.mark.parametrize("name", NAMES)
def test_shape_law_and_larger_programs(name):
    """The same bits under vmap, scan and remat and where a program goes on with the value; compiled once."""
    fmt, x, traces = get_kv(name), jnp.asarray(X), []
    want = np.asarray(fmt.fake_quant(x)).tobytes()

    @jax.jit
    def run(x):
        traces.append(0)
        _, scanned = jax.lax.scan(lambda c, row: (c, fmt.fake_quant(row[None])[0]), 0, x)
        y = fmt.fake_quant(x * 1.0)
        return (
            jax.vmap(lambda row: fmt.fake_quant(row[None])[0])(x),
            scanned,
            jax.checkpoint(fmt.fake_quant)(x),
            y,
            y + x,
        )

    for got in run(x)[:4]:
        assert np.asarray(got).tobytes() == want
    run(x * 2)
    assert len(traces) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_stored_shows(name, bad):
    """Nothing can raise inside of a forward pass: NaN and infinity turn what shares their scale to something that is
    not finite, which every evaluation refuses, and nothing else."""
    fmt, x = get_kv(name), X[:, : fmt_tokens(name)].copy()
    x[1, 0, 1, 5] = bad
    y = np.asarray(jax.jit(fmt.fake_quant)(x))
    assert not np.isfinite(y[1, 0, 1, 5])
    assert np.isfinite(y[0]).all() and np.isfinite(y[1, :, 0]).all()


def fmt_tokens(name: str) -> int:
    return max(get_kv(name).tokens, 4)


def test_the_rule():
    seen = lambda name, t, size=12: get_kv(name).seen(jnp.asarray([[t]]), size)[0, 0].tolist()  # noqa: E731
    count = lambda name, t: sum(seen(name, t))  # noqa: E731
    assert seen("int4", 3) == [True] * 4 + [False] * 8
    assert [count("int4:w3", t) for t in range(7)] == [0, 0, 0, 1, 2, 3, 4]
    assert [count("int2:channel:g4", t) for t in range(9)] == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert [count("int2:channel:g4:w4", t) for t in range(13)] == [0] * 7 + [4] * 4 + [8] * 2

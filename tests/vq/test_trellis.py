"""Codes against fp16 arithmetic, the published distortion, the layouts of QTIP and EXL3, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.base import FormatError
from lowbit.vq import trellis_pack
from lowbit.vq.trellis import ORDERS, TrellisFormat
from lowbit.vq.trellis_codes import UNITS, latin_row, rms_of, table_of
from lowbit.vq.viterbi import Trellis, states_at

STATES = np.arange(2**16, dtype=np.uint64)


def fp16(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits, np.uint16).view(np.float16)


def byte_sum(y: np.ndarray) -> np.ndarray:
    return sum((y >> np.uint64(i)) & np.uint64(255) for i in (0, 8, 16, 24)).astype(np.int64)


def reference(code: str) -> np.ndarray:
    """Values of all states of 16 bits, in the arithmetic that the codes were published with."""
    wrap = np.uint64(2**32 - 1)
    if code == "1mad":
        y = (STATES * np.uint64(34038481) + np.uint64(76625530)) & wrap
        return ((byte_sum(y) - 510) / 147.800537109375).astype(np.float32)
    if code == "mul1":
        level = fp16(0x6400 + byte_sum((STATES * np.uint64(0x83DCD12D)) & wrap)).astype(np.float64)
        return (level * float(fp16(0x1EEE)) + float(fp16(0xC931))).astype(np.float16)
    y = STATES * np.uint64(89226354) + np.uint64(64248484) if code == "3inst" else STATES * np.uint64(0xCBAC1FED)
    y = ((y & wrap) & np.uint64(0x8FFF8FFF)) ^ np.uint64(0x3B603B60)
    return fp16(y >> np.uint64(16)) + fp16(y & np.uint64(0xFFFF))


@pytest.mark.parametrize(
    "code, first, rms, unique",
    [
        ("1mad", [-1.2516869, -0.8389685, -0.42625013, -0.01353175], 1.000088, 908),
        ("3inst", [0.7680664, -0.9194336, 0.9316406, 0.2944336], 1.243711, 10598),
        ("mcg", [1.84375, 0.13452148, -0.75927734, 0.83984375], 1.244112, 10746),
        ("mul1", [-3.453125, 0.6411133, -0.44848633, 0.19445801], 1.000312, 913),
    ],
)
def test_computed_codes(code: str, first: list[float], rms: float, unique: int):
    got = np.asarray(table_of(code, Trellis(16, (2,))))[0]
    published = (got / np.float32(UNITS.get(code, 1))).astype(np.float32)
    np.testing.assert_array_equal(published, reference(code).astype(np.float32))
    np.testing.assert_allclose(published[:4], first, rtol=1e-7)
    assert len(np.unique(got)) == unique and abs(rms_of(code, Trellis(16, (2,))) / UNITS.get(code, 1) - rms) < 1e-6
    assert ((got.view(np.uint32) & 0x1FFF) == 0).all()  # 11 significant bits


def test_hyb_looks_up_pairs_and_flips_the_first():
    fmt = base.get("trellis2:hyb:l12")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((32, 32)), jnp.float32)
    q = fmt.encode(w)
    codes, stored = q.codes()
    states = np.asarray(fmt.states(codes)).astype(np.uint64)
    h = (states * (states + np.uint64(1))) & np.uint64(2**32 - 1)
    pair = np.asarray(stored["codebook"])[((h >> np.uint64(6)) & np.uint64(511)).astype(int)]
    pair[..., 0] *= np.where((h >> np.uint64(15)) & np.uint64(1), -1, 1)
    want = np.asarray(fmt.weights(jnp.asarray(pair), 2)) * np.asarray(stored["scale"])
    np.testing.assert_array_equal(q.decode(), want.astype(np.float32))
    assert np.asarray(stored["codebook"]).std() == pytest.approx(np.sqrt(1 - 2**-4), rel=1e-3)


@pytest.mark.parametrize("widths, L", [((2,), 12), ((3,), 12), ((1, 2), 10)])
def test_branches_of_latin_lie_in_different_quantiles(widths: tuple[int, ...], L: int):
    """Those that leave a state, and those that meet in one."""
    k = max(widths)
    first = np.asarray(latin_row(Trellis(L, widths), jnp.arange(2**L))) >> (10 - k)
    for branches in (first.reshape(-1, 2**k), first.reshape(2**k, -1).T):
        np.testing.assert_array_equal(np.sort(branches, axis=1), np.broadcast_to(np.arange(2**k), branches.shape))


# Published: L = 12, V = 1, random code, tail-biting (QTIP, table 2), and our own measurements of other codes.
@pytest.mark.parametrize(
    "name, error, tolerance",
    [
        ("trellis2:lut:l12", 0.0733, 0.0015),
        ("trellis2:mcg:l12", 0.0738, 0.0015),
        ("trellis4:lut:l12", 0.0053, 0.0003),
        ("trellis2:latin:l12", 0.0703, 0.0014),
        pytest.param("trellis2:latin", 0.0673, 0.001, marks=pytest.mark.slow),
        pytest.param("trellis1:lut:l12", 0.2750, 0.005, marks=pytest.mark.slow),
        pytest.param("trellis3:lut:l12", 0.0196, 0.0005, marks=pytest.mark.slow),
        pytest.param("trellis2:mcg", 0.0685, 0.0012, marks=pytest.mark.slow),
        pytest.param("trellis3:mul1", 0.0174, 0.0004, marks=pytest.mark.slow),
        pytest.param("trellis2:hyb", 0.0710, 0.0012, marks=pytest.mark.slow),
    ],
)
def test_distortion_of_normal_weights(name: str, error: float, tolerance: float):
    w = np.random.default_rng(1).standard_normal((128, 256)).astype(np.float32)
    fmt = base.get(name)
    w_hat = np.asarray(jax.jit(fmt.fake_quant)(w))
    assert abs(np.mean((w - w_hat) ** 2) / np.mean(w**2) - error) < tolerance


def test_rounding_what_is_on_the_grid_changes_nothing():
    fmt = base.get("trellis2.5:mcg:l12")
    rng = np.random.default_rng(2)
    codes = np.stack([rng.integers(0, 4 + 4 * (n % 2 == 0), 2) for n in range(512)], axis=1)  # 3 bits, then 2, then 3
    stored = fmt.stored({"scale": jnp.full((1, 1), 0.0173, jnp.float32)})
    w = fmt.dequantize(jnp.asarray(codes, jnp.int32), stored)
    again, w_hat = fmt.round_block(w, stored)
    np.testing.assert_array_equal(w_hat, w)
    left, right = (fmt.round_block(w[:, i : i + 16], stored)[0] for i in (0, 16))
    np.testing.assert_array_equal(jnp.concatenate([left, right], axis=1), again)


def test_gradients():
    fmt = base.get("trellis2:hyb:l10")
    w = jnp.asarray(np.random.default_rng(3).standard_normal((32, 32)) * 0.02, jnp.float32)
    g = jnp.asarray(np.random.default_rng(4).standard_normal((32, 32)), jnp.float32)
    params = base._init(fmt, w)
    value, gw, gp = jax.jit(lambda w, p: (lambda v, pull: (v, *pull(g)))(*jax.vjp(fmt.fake_quant, w, p)))(w, params)
    q = fmt.encode(w, params)
    codes, stored = q.codes()
    np.testing.assert_array_equal(value, q.decode())
    np.testing.assert_array_equal(gw, g)
    level, ratio = np.asarray(value, "f8") / np.asarray(stored["scale"]), np.asarray(w / stored["scale"], "f8")
    inside = np.abs(ratio) <= np.abs(np.asarray(stored["codebook"])).max()
    want = (np.asarray(g) * (level - np.where(inside, ratio, 0))).sum()
    np.testing.assert_allclose(gp["scale"], want, rtol=1e-3)
    # With codes as they are the weights are linear in the codebook; this is their derivative.
    _, pull = jax.vjp(lambda book: fmt.dequantize(codes, {**stored, "codebook": book}), stored["codebook"])
    np.testing.assert_allclose(gp["codebook"], pull(g)[0], rtol=1e-4, atol=1e-5)


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trellis2:mcg:l12", "trellis3:mul1", "trellis1.5:hyb:l10", "trellis2.5:3inst:l10"])
def test_any_weight_decodes_alone(name: str):
    """The bytes of a tile are one number; a step's state is read where it lies."""
    fmt = base.get(name)
    rng, n = np.random.default_rng(5), 256 // fmt.V
    widths = np.resize(fmt.trellis.widths[::-1], 2 * n)
    codes = jnp.asarray(rng.integers(0, 2**widths, (2, 2 * n)), jnp.int32)
    book = {"codebook": jnp.ones((512, 2))} if fmt.code == "hyb" else {}
    packed = fmt.pack(codes, {"scale": jnp.ones((1, 1)), **book})
    tiles = packed["codes"].reshape(4, -1)
    steps = np.array([0, 5, n - 1])
    np.testing.assert_array_equal(states_at(fmt.trellis, tiles, jnp.asarray(steps), n), fmt.states(codes)[:, steps])


@pytest.mark.parametrize("K", [1, 2, 3, 4, 7, 8])
def test_exl3_layout(K: int):
    """Read back as exllamav3's kernels do: 16 bits that end with a step's own, out of uint32 words."""
    fmt, shape = base.get(f"trellis{K}:mcg"), (32, 48)
    rng = np.random.default_rng(K)
    codes = jnp.asarray(rng.integers(0, 2**K, (2, 3 * 256)), jnp.int32)
    states = np.asarray(fmt.states(codes))
    trellis = trellis_pack.to_exl3(states, K, shape)
    assert trellis.dtype == np.int16 and trellis.shape == (3, 2, 16 * K)
    np.testing.assert_array_equal(trellis_pack.from_exl3(trellis, K), states)
    value = reference("mcg")
    dense = np.zeros((48, 32), np.float16)  # [in, out]
    for i, o in np.ndindex(3, 2):
        words = np.ascontiguousarray(trellis[i, o]).view("<u4")
        bits = "".join(f"{int(x):032b}" for x in words)
        for t in range(256):
            window = "".join(bits[(t * K + K - 16 + b) % len(bits)] for b in range(16))
            lane, part = divmod(t, 8)
            row = (lane % 4) * 2 + (part & 1) + 8 * ((part >> 1) & 1)
            dense[16 * i + row, 16 * o + lane // 4 + 8 * (part >> 2)] = value[int(window, 2)]
    np.testing.assert_array_equal(fmt.dequantize(codes, {"scale": jnp.ones((1, 1))}), dense.T.astype(np.float32))
    # Our own bytes are the same uint32 words, from the last to the first.
    own = np.asarray(fmt.pack(codes, {"scale": jnp.ones((1, 1))})["codes"]).reshape(2, 3, -1)
    np.testing.assert_array_equal(own[1, 2].view("<u4")[::-1], np.ascontiguousarray(trellis[2, 1]).view("<u4"))


@pytest.mark.parametrize("K, V, L", [(2, 2, 16), (3, 1, 16), (4, 2, 12), (1, 1, 10)])
def test_qtip_layout(K: int, V: int, L: int):
    """QTIP writes the first state whole, then each step's bits, and drops what wraps around."""
    fmt = base.get(f"trellis{K}:lut:l{L}:v{V}:qtip")
    width, n = K * V, 256 // V
    rng = np.random.default_rng(K)
    states = np.asarray(fmt.states(jnp.asarray(rng.integers(0, 2**width, (2, 2 * n)), jnp.int32)))
    words = trellis_pack.to_qtip(states, width, L)
    assert words.dtype == np.int16 and words.shape == (4, 16 * K)
    for row, path in zip(words, states):
        bits = f"{path[0]:0{L}b}" + "".join(f"{s & (2**width - 1):0{width}b}" for s in path[1:])
        assert "".join(f"{int(x) & 0xFFFF:016b}" for x in row) == bits[: 256 * K]
    np.testing.assert_array_equal(trellis_pack.from_qtip(words, width, L), states)
    ends = trellis_pack.bits_of(states, width)
    starts = trellis_pack._bits(words)
    np.testing.assert_array_equal(np.roll(ends, L - width, axis=1), starts)
    np.testing.assert_array_equal(trellis_pack.rotate(ends, width, L), starts)
    broken = states.copy()
    broken[1, 7] ^= 1 << (L - 1)
    with pytest.raises(FormatError, match=r"tile 1 do not follow one another at step 7 \(allowed: closed paths\)"):
        trellis_pack.to_qtip(broken, width, L)


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_a_tile(order: str):
    fmt = TrellisFormat(2.0, "lut", 8, 2, order)
    w = jnp.arange(32 * 48, dtype=jnp.float32).reshape(32, 48)
    paths = fmt.paths(w)
    np.testing.assert_array_equal(fmt.weights(paths, 2), w)
    index = np.arange(256).reshape(16, 16)  # [out, in]
    if order == "rows":
        want = index.reshape(-1)
    elif order == "qtip":
        want = index.reshape(2, 8, 2, 4, 2).transpose(1, 3, 2, 0, 4).reshape(-1)
    else:
        want = np.array([index[t // 4 + c, t % 4 * 2 + r] for t in range(32) for c in (0, 8) for r in (0, 1, 8, 9)])
    tile = np.asarray(w)[16:, 32:].reshape(-1)
    np.testing.assert_array_equal(np.asarray(paths)[5].reshape(-1), tile[want])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 32), (32, 24), (0, 16)])
def test_shapes_that_no_tile_divides_are_refused(shape: tuple[int, ...]):
    with pytest.raises(FormatError, match=r"trellis2:mcg:l10: weight of shape .* \(both sides must be multiples of"):
        base.get("trellis2:mcg:l10").encode(jnp.zeros(shape))


def test_a_codebook_larger_than_the_weight_is_refused():
    with pytest.raises(FormatError, match=r"codebook of 8192 bytes for a weight of shape \(32, 32\) \(must .* 2048"):
        base.get("trellis2:lut:l12").encode(jnp.zeros((32, 32)))


def test_damaged_files_are_refused():
    fmt = base.get("trellis2:hyb:l10")
    arrays = fmt.encode(jnp.ones((32, 32))).arrays
    for k, bad in {
        "codes": arrays["codes"][:, :-1],
        "scale": arrays["scale"][0],
        "codebook": arrays["codebook"][:100],
    }.items():
        with pytest.raises(FormatError, match=rf"array {k} of shape .* for a weight \[32, 32\] \(must be"):
            fmt.unpack({**arrays, k: bad}, (32, 32))
    with pytest.raises(FormatError, match=r"array codebook of shape none"):
        fmt.unpack({k: a for k, a in arrays.items() if k != "codebook"}, (32, 32))

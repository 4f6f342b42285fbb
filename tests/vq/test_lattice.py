"""E8P and its residual codebook: the tables, nearest points against brute force, QuIP#'s layouts read independently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.base import FormatError, QTensor
from lowbit.vq import e8, lattice
from lowbit.vq.lloyd_max import lloyd_max

nearest = jax.jit(lattice.nearest, static_argnums=1)
nearest8 = jax.jit(lambda x, step: lattice.nearest8(x[None], step)[0], static_argnums=1)


def by_definition() -> set[tuple[float, ...]]:
    """The codebook from its definition alone: points v of E8 + 1/4 with v -+ 1/4 of a listed shape."""
    kept = {tuple(int(c) for c in row) for row in lattice.NORM12}
    odd = 2 * np.array(np.meshgrid(*[[-3, -2, -1, 0, 1, 2]] * 8)).reshape(8, -1).T + 1  # twice the half-integers
    norm = np.sum(odd**2, axis=1)
    odd = odd[((norm <= 40) | (norm == 48)) & (odd.sum(axis=1) % 4 == 0)]
    norm = np.sum(odd**2, axis=1)
    odd = [v for v, n in zip(odd, norm) if n <= 40 or tuple(np.abs(v)) in kept]
    return {tuple(v / 2 + shift) for v in odd for shift in (0.25, -0.25)}


def test_table():
    rows, points = lattice.rows(), lattice.points()
    norms = np.sum(rows**2, axis=1)
    assert {n: int((norms == n).sum()) for n in np.unique(norms)} == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert (np.lexsort(rows[:227].T[::-1]) == np.arange(227)).all()
    assert len(np.unique(points, axis=0)) == 65536 and np.sqrt(np.mean(points**2)) == 1.09375
    assert np.abs(points).max() == 2.75
    # E8 + 1/4: less 1/4, all whole or all halves, with an even sum.
    v = points - 0.25
    assert ((v % 1 == 0).all(1) | (v % 1 == 0.5).all(1)).all() and (v.sum(1) % 2 == 0).all()
    assert lattice.table().nbytes == 1024


@pytest.mark.slow
def test_codebook_is_the_one_defined():
    assert set(map(tuple, lattice.points().tolist())) == by_definition()


def test_small_codebook():
    points = lattice.points8()
    assert points.shape == (256, 8) and len(np.unique(points, axis=0)) == 256
    norms = np.sum(points**2, axis=1)
    assert [(norms == n).sum() for n in (0, 2, 4)] == [1, 240, 15] and (points.sum(1) % 2 == 0).all()
    assert -2 not in points[:, 7] and (points[241] == 2 * np.eye(8)[0]).all()


def test_codes_are_read_from_the_1_kib_table():
    """Written from the layout's description: shuffled nibbles, a parity bit that is the shift."""
    words, shuffle = lattice.table().view(np.uint32), [0, 4, 1, 5, 2, 6, 3, 7]
    codes = np.random.default_rng(0).integers(0, 65536, 2000)
    want = []
    for c in codes.tolist():
        signs, word = c & 255, int(words[c >> 8])
        parity = signs.bit_count() & 1
        signs ^= parity
        v = [((word >> 4 * k & 15) - 8) / 2 * (-1 if signs >> k & 1 else 1) for k in shuffle]
        want.append([a - 0.25 if parity else a + 0.25 for a in v])
    np.testing.assert_array_equal(lattice.points()[codes], np.float32(want))


def test_decoders_and_idempotence():
    codes, codes8 = np.arange(65536, dtype=np.int32), np.arange(256, dtype=np.int32)
    np.testing.assert_array_equal(jax.jit(lattice.decode)(codes), lattice.points())
    np.testing.assert_array_equal(jax.jit(lattice.decode8)(codes8), lattice.points8())
    np.testing.assert_array_equal(nearest(jnp.asarray(lattice.points()), 1.0), codes)
    np.testing.assert_array_equal(nearest8(jnp.asarray(lattice.points8()) * np.float32(0.5), 0.5), codes8)


def worst(x: np.ndarray, step: float, search, points: np.ndarray) -> float:
    """By how much the nearest point found is farther (squared, in units of the codebook) than that of brute force, at
    most, relative to 1 plus the vector's largest coordinate."""
    code = np.asarray(search(jnp.asarray(x * np.float32(step)), step))
    half = np.sum(points**2, axis=1) / 2
    gap = 0.0
    for at in range(0, len(x), 250):
        part = x[at : at + 250]
        scores = part @ points.T - half
        off = scores.max(1) - scores[np.arange(len(part)), code[at : at + 250]]
        gap = max(gap, float((off / (1 + np.abs(part).max(1))).max()))
    return 2 * gap


def vectors(n: int) -> np.ndarray:
    """Normal ones of three sizes, with heavy tails, and ones on the lattice's edges."""
    rng = np.random.default_rng(n)
    parts = [s * rng.standard_normal((n // 5, 8)) for s in (0.5, 1, 2)]
    parts += [rng.standard_t(2, (n // 5, 8)), rng.integers(-12, 13, (n - 4 * (n // 5), 8)) / 8]
    return np.concatenate(parts).astype(np.float32)


def check_nearest(n: int, *steps: float) -> None:
    x = vectors(n)
    for search, points in ((nearest, lattice.points()), (nearest8, lattice.points8())):
        for step in steps:
            assert worst(x, step, search, points) < 1e-5
    wrong = lambda x, step: nearest(x[:, ::-1], step)  # noqa: E731
    assert worst(x[:500], 1.0, wrong, lattice.points()) > 0.1


def test_nearest_points_are_those_of_brute_force():
    check_nearest(10_000, 1.0)
    check_nearest(1_000, 35617 / 65536)


@pytest.mark.slow
def test_nearest_points_of_a_million():
    check_nearest(1_000_000, 1.0)


def test_ties_are_decided_one_way():
    """Eighths are halfway between many points, and zero as near to one of either shift."""
    x = jnp.asarray(np.random.default_rng(0).integers(-12, 13, (4000, 8)).astype(np.float32) / 8)
    assert (lattice.points()[np.asarray(nearest(x[:1] * 0, 1.0))] == -0.25).all()  # -1/2 + 1/4: the positive shift
    with jax.disable_jit():
        one = lattice.nearest(x[:64], 1.0), lattice.nearest8(x[None, :64], 0.5)[0]
    np.testing.assert_array_equal(one[0], nearest(x, 1.0)[:64])
    np.testing.assert_array_equal(one[1], nearest8(x, 0.5)[:64])


# -- formats ----------------------------------------------------------------------------------------------------------


@functools.cache
def normal() -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal((64, 4096)), jnp.float32)


@pytest.mark.parametrize(
    "name, error",
    [("e8p2", 0.0915), ("e8p3", 0.0292), ("e8p4", 0.0079), ("e8p3:rho0.98:r2.04", 0.0295)],
)
def test_distortion(name: str, error: float):
    w = np.asarray(normal(), np.float64)
    w_hat = np.asarray(base.get(name).encode(normal()).decode(), np.float64)
    assert abs(np.mean((w_hat - w) ** 2) / np.mean(w**2) - error) < 0.01 * error


def test_a_searched_scale_is_better_on_heavy_tails_and_no_worse_on_normal_weights():
    heavy = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 256)), jnp.float32)
    error = lambda name, w: float(jnp.sum(jnp.square(base.get(name).encode(w).decode() - w)))  # noqa: E731
    assert error("e8p2:mse", heavy) < 0.98 * error("e8p2", heavy)
    assert error("e8p2:mse", normal()[:, :256]) <= error("e8p2", normal()[:, :256])


@pytest.mark.parametrize("name", ["e8p2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("e8p3", "e8p4"))])
def test_searching_in_parts_changes_nothing_and_bounds_memory(name: str, monkeypatch):
    fmt, w = base.get(name), normal()[:, :128]
    stored = fmt.stored(fmt.init(w))
    shapes = jax.ShapeDtypeStruct((4096, 1024), jnp.float32), {"scale": jax.ShapeDtypeStruct((1, 1), jnp.float32)}
    held = jax.jit(fmt.quantize).lower(*shapes).compile().memory_analysis()
    assert held.temp_size_in_bytes < 30 * e8.PART < 4096 * 1024 * 4
    monkeypatch.setattr(e8, "PART", 16 * 128)  # 64 rows in 4 parts
    np.testing.assert_array_equal(fmt.quantize(w, stored), jax.jit(fmt._codes)(w, stored))


def test_gradients():
    """Everything passes to the weights; the scale's is the level, less w / scale where the codebook's end is not what
    stops a vector."""
    fmt, w = base.get("e8p2"), jnp.asarray(vectors(40).reshape(8, 40))
    params = {"scale": jnp.full((1, 1), 0.7, jnp.float32)}
    g = np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)

    def run(w, params):
        value, pull = jax.vjp(fmt.fake_quant, w, params)
        return value, *pull(jnp.asarray(g))

    value, gw, gp = jax.jit(run)(w, params)
    level = np.asarray(value, np.float64) / np.float32(0.7)
    off = level - np.asarray(w, np.float64) / np.float32(0.7)
    far = np.repeat(np.sum(off.reshape(8, 5, 8) ** 2, axis=-1) > 1, 8, axis=1)
    assert far.any() and not far.all()
    np.testing.assert_array_equal(gw, g)
    np.testing.assert_allclose(gp["scale"], [[np.sum(g * np.where(far, level, off))]], rtol=1e-4)


@pytest.mark.parametrize("name", ["e8p2", "e8p3", "e8p4"])
def test_bad_shapes_and_files_are_refused(name: str):
    fmt = base.get(name)
    with pytest.raises(FormatError, match=rf"{name}: weight of shape \(4, 100\) \(rows must be a multiple of 8 long\)"):
        jax.eval_shape(fmt.encode, jnp.ones((4, 100)))
    with pytest.raises(FormatError, match=r"weight of shape \(4, 2, 8\) \(must be \[out, in\]\)"):
        fmt.check((4, 2, 8))
    arrays = {"codes": jnp.zeros((4, 2 * fmt.width + 1), jnp.uint8), "scale": jnp.ones((1, 1))}
    with pytest.raises(FormatError, match=rf"{name}: codes of a 4 x 16 weight are uint8 \[4, .*must be uint8 \[4, "):
        QTensor(arrays, fmt, (4, 16)).decode()
    with pytest.raises(FormatError, match=rf"{name}: scale of shape \[4\] \(must be \[1, 1\]\)"):
        fmt.unpack({"codes": arrays["codes"][:, :-1], "scale": jnp.ones(4)}, (4, 16))
    with pytest.raises(FormatError, match=rf"{name}: scale is nan \(must be finite\)"):
        fmt.encode(jnp.ones((4, 16)), {"scale": jnp.full((1, 1), jnp.nan)})


# -- QuIP#'s kernel layout --------------------------------------------------------------------------------------------


def test_kernel_words():
    """Read by a reader of its own, from the description: int64 `w` at block (16 rows, 8 vectors), place (8, 4)."""
    codes = np.random.default_rng(0).integers(0, 65536, (32, 24)).astype(np.int32)
    words = e8.pack_gemv(codes)
    assert words.dtype == np.int64 and words.shape == (32, 6) and words.nbytes * 8 == 2 * 8 * codes.size
    flat = iter(words.reshape(-1).tolist())
    found = np.zeros_like(codes)
    for m in range(0, 32, 16):
        for n in range(0, 24, 8):
            for a in range(8):
                for b in range(4):
                    w = next(flat) & (2**64 - 1)
                    for k in range(4):
                        sign = sum((w >> (32 + 4 * j + k) & 1) << j for j in range(8))
                        found[m + 2 * a + k % 2, n + 2 * b + k // 2] = (w >> (8 * k) & 255) << 8 | sign
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(e8.unpack_gemv(words), codes)


def test_kernel_words_of_the_small_codebook():
    codes = np.random.default_rng(0).integers(0, 256, (3, 16)).astype(np.int32)
    words = e8.pack_gemv8(codes)
    want = [[sum(int(c) << 8 * i for i, c in enumerate(row[k : k + 8])) for k in (0, 8)] for row in codes]
    np.testing.assert_array_equal(words.view(np.uint64), np.array(want, np.uint64))
    np.testing.assert_array_equal(e8.unpack_gemv8(words), codes)


def test_kernel_words_refuse():
    codes = np.zeros((16, 8), np.int32)
    for bad, value in ((codes - 1, -1), (codes + 65536, 65536)):
        with pytest.raises(FormatError, match=rf"e8p code {value} \(allowed: 0 to 65535\)"):
            e8.pack_gemv(bad)
    with pytest.raises(FormatError, match=r"codes of shape \[8, 8\] for the e8p kernel \(allowed: 16 m rows"):
        e8.pack_gemv(codes[:8])
    with pytest.raises(FormatError, match=r"words of the e8p kernel are int64 \[16, 3\] \(allowed"):
        e8.unpack_gemv(np.zeros((16, 3), np.int64))
    with pytest.raises(FormatError, match=r"e8 code 256 \(allowed: 0 to 255\)"):
        e8.pack_gemv8(codes + 256)


# -- Lloyd-Max --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, error, positive",
    [
        (1, 0.363380, [0.79788]),
        (2, 0.117482, [0.45278, 1.51042]),
        (3, 0.034548, [0.24509, 0.75601, 1.34391, 2.15195]),
        (4, 0.009501, [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259]),
    ],
)
def test_lloyd_max(bits: int, error: float, positive: list[float]):
    levels, found = lloyd_max(bits)
    assert abs(found - error) < 1e-6
    np.testing.assert_allclose(levels, [-a for a in positive[::-1]] + positive, atol=1e-5)


def test_lloyd_max_refuses():
    with pytest.raises(InputError, match=r"Lloyd-Max quantizer of 9 bits \(allowed: 1 to 8\)"):
        lloyd_max(9)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.linalg import hadamard
from lowbit.linalg.hadamard import core, cores, matrix, randomized, transform

# Orders K and model widths that the rotations of published models need.
ORDERS = [12, 20, 28, 36, 40, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124, 132, 140, 148, 156, 164, 172, 180, 924]
WIDTHS = """11008 13824 14336 5632 3584 18944 4864 8960 27648 29568 9728 17408 25600 2304 9216 3840 15360 5376 21504
6912 2880 576 960 14848 4096 8192""".split()


@pytest.mark.parametrize("n", ORDERS)
def test_orders_of_the_literature(n: int):
    h = matrix(n).astype(np.int64)
    assert set(np.unique(h)) == {-1, 1} and (h @ h.T == n * np.eye(n)).all()


def test_every_core_is_hadamard_and_symmetric_where_it_says_so():
    found = [c for n in range(2, 513) if (c := core(n))]
    assert len(found) == 77
    for c in found:
        h = c.matrix().astype(np.int64)
        assert (h @ h.T == c.order * np.eye(c.order)).all(), c
        assert (h == h.T).all() == c.symmetric, c
    unreached = [n for n in range(4, 300, 4) if cores(n) is None]
    assert unreached == [188, 236, 260, 268, 292]


@pytest.mark.parametrize("n", [int(w) for w in WIDTHS])
def test_every_listed_width_has_a_transform_of_small_factors(n: int):
    t = transform(n)
    sizes = [int(f.split()[1]) for f in t.factors]
    assert np.prod(sizes) == n and max(sizes) <= 172 and "DCT" not in t.name and t.blocks == 1


@pytest.mark.parametrize("n", [1, 2, 8, 12, 28, 96, 128, 240, 368, 464, 624])
def test_transform_is_the_dense_product(n: int):
    t, x = transform(n), np.random.default_rng(n).standard_normal((3, 2, n))
    dense = t.dense()
    np.testing.assert_allclose(dense @ dense.T, np.eye(n), atol=1e-12)
    with jax.enable_x64(True):
        y = t(jnp.asarray(x))
        np.testing.assert_allclose(y, x @ dense.T, atol=1e-12)
        np.testing.assert_allclose(t(y, inverse=True), x, atol=1e-12)
        np.testing.assert_allclose(t(y), x, atol=1e-12) if t.symmetric else None
    np.testing.assert_allclose(t(jnp.asarray(x, jnp.float32)), x @ dense.T, atol=1e-5)


@pytest.mark.parametrize("n", [92, 156 * 2, 24])
def test_gradient_is_the_transposed_transform(n: int):
    """Also for cores that are not symmetric, where reusing the forward transform is wrong."""
    t, rng = transform(n), np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, n)), jnp.float32) for _ in range(2))
    grad = jax.grad(lambda x: jnp.sum(t(x) * g))(x)
    np.testing.assert_allclose(grad, np.asarray(g) @ t.dense(), atol=1e-5)
    if not t.symmetric:
        assert np.abs(np.asarray(grad) - np.asarray(t(g))).max() > 0.1


def test_bfloat16_is_computed_in_float32():
    t, x = transform(512), jnp.asarray(np.random.default_rng(0).standard_normal((4, 512)), jnp.bfloat16)
    y = t(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, t(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_an_outlier_is_spread_evenly():
    x = jnp.zeros((76 * 64,)).at[7].set(3.0)
    np.testing.assert_allclose(jnp.abs(transform(76 * 64)(x)), 3.0 / np.sqrt(76 * 64), rtol=1e-5)


def test_kronecker_identity_across_and_within_heads():
    """`(I x H_d)(H_h x I) = H_hd`: the transform over heads times the one inside them is a transform of everything."""
    heads, dim = transform(12).dense(), transform(16).dense()
    whole = np.kron(np.eye(12), dim) @ np.kron(heads, np.eye(16))
    np.testing.assert_allclose(whole, np.kron(heads, dim), atol=1e-12)


def test_randomized_rotations_are_orthogonal_and_reproducible():
    a, b = randomized(48, jax.random.key(0)), randomized(48, jax.random.key(1))
    np.testing.assert_allclose(a @ a.T, np.eye(48), atol=1e-12)
    assert (a == randomized(48, jax.random.key(0))).all() and (a != b).any()
    np.testing.assert_allclose(np.abs(a), 48**-0.5, atol=1e-12)


# -- lengths without a construction -----------------------------------------------------------------------------------


def test_refusals_name_what_would_work():
    with pytest.raises(InputError, match=r"order 13696 .*fallback dct, which takes a DCT of 107, or blocks of 128"):
        transform(13696)
    with pytest.raises(InputError, match=r"order 9 .*fallback dct, which takes a DCT of 9\)"):
        transform(9)
    with pytest.raises(InputError, match=r"odd length 9 \(allowed: fallback dct\)"):
        transform(9, "blocks")
    with pytest.raises(InputError, match="blocks of 100 .* length 256"):
        transform(256, block=100)
    with pytest.raises(InputError, match="fallback 'pad'"):
        transform(256, "pad")
    with pytest.raises(InputError, match=r"length 16 on a last axis of 8"):
        transform(16)(jnp.zeros(8))


@pytest.mark.parametrize(
    "n, options, name",
    [
        (13696, {"fallback": "dct"}, "DCT 107 x 128"),
        (9, {"fallback": "dct"}, "DCT 9 x 1"),
        (13696, {"fallback": "blocks"}, "107 blocks of 128"),
        (1536, {"block": 128}, "12 blocks of 128"),
        (48, {"fallback": "dct"}, "12 (Paley II, q = 5) x 4"),  # not needed, so not used
    ],
)
def test_fallbacks_are_reported_and_orthonormal(n: int, options: dict, name: str):
    t = transform(n, **options)
    assert t.name == name
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, n)), jnp.float32)
    np.testing.assert_allclose(t(t(x), inverse=True), x, atol=2e-5)
    np.testing.assert_allclose(jnp.linalg.norm(t(x), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    if n <= 2048:
        np.testing.assert_allclose(t(x), np.asarray(x) @ t.dense().T, atol=1e-4)


def test_largest_core_bounds_a_dense_factor():
    assert hadamard.core(hadamard.LARGEST_CORE + 4) is None

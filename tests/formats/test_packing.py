import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats.base import FormatError, stored_bytes
from lowbit.formats.packing import pack, packed_size, unpack


def reference(codes: np.ndarray, bits: int) -> np.ndarray:
    """The stream, bit by bit."""
    stream = ((codes[..., None] >> np.arange(bits)) & 1).reshape(codes.shape[0], -1).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little")


@pytest.mark.parametrize("bits", [*range(1, 10), 12, 15, 16, 23, 24])
@pytest.mark.parametrize("n", [1, 37, 64])
def test_pack_is_a_little_endian_stream_and_unpack_its_inverse(bits: int, n: int):
    codes = np.random.default_rng(bits * 100 + n).integers(0, 2**bits, (3, n)).astype(np.int32)
    packed = jax.jit(pack, static_argnums=1)(codes, bits)  # the eager bits: the conformance suite
    assert packed.shape == (3, packed_size(n, bits)) and stored_bytes(packed) == 3 * -(-n * bits // 8)
    np.testing.assert_array_equal(packed, reference(codes, bits))
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=(1, 2))(packed, bits, n), codes)


def test_words_are_what_mlx_and_gptq_read():
    codes = np.random.default_rng(0).integers(0, 8, (2, 32)).astype(np.int32)
    words = np.asarray(pack(jnp.asarray(codes), 3)).view("<u4")
    for i in range(32):  # code i at bit 3i of the 96-bit integer that three words make
        whole = [sum(int(w) << (32 * j) for j, w in enumerate(row)) for row in words]
        assert [(x >> (3 * i)) & 7 for x in whole] == list(codes[:, i])


@pytest.mark.parametrize("bits", [3, 4])
def test_leading_axes_and_vmap(bits: int):
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, (2, 3, 5, 24)), jnp.int32)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, jax.vmap(lambda c: pack(c, bits))(codes))
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda p: unpack(p, bits, 24)))(packed), codes)


def test_refusals():
    with pytest.raises(FormatError, match="25 bits per code .allowed: 1 to 24"):
        pack(jnp.zeros((1, 8), jnp.int32), 25)
    with pytest.raises(FormatError, match="packed rows of 4 bytes .9 codes of 4 bits take 5"):
        unpack(jnp.zeros((1, 4), jnp.uint8), 4, 9)
    with pytest.raises(FormatError, match="int4 has no defined stored size"):
        stored_bytes(jnp.zeros((4,), jnp.int4))

"""Packing of b-bit codes, b in 1..24, into uint8 words: a dense little-endian bit stream along the last axis.

Code `i` of a row occupies bits `[i*b, (i+1)*b)` of that row's stream; bit `j` of the stream is bit `j % 8` of byte
`j // 8`. Rows are padded to a whole byte, so a row of `n` codes takes `ceil(n*b/8)` bytes. The same layout, seen as
little-endian uint32 words, is what MLX and GPTQ call packed. Codes may also take turns between widths (`bits` a tuple).

Shifts are done on uint32 (unsigned, and wide enough for TPU vectors, which have no 8-bit shift); unpacked codes come
back as int32, never int8: XLA:CPU miscompiles an int8 subtraction that is fused into a reduction.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from lowbit.formats.base import FormatError

Bits = int | tuple[int, ...]


def packed_size(n: int, bits: Bits) -> int:
    """Bytes of a row of `n` codes."""
    widths = (bits,) if isinstance(bits, int) else bits
    cycles, rest = divmod(n, len(widths))
    return -(-(cycles * sum(widths) + sum(widths[:rest])) // 8)


def _period(bits: Bits) -> tuple[list[int], list[int], int]:
    """`(first bits, widths, bytes)` of the codes after which the bit pattern repeats."""
    widths = [bits] if isinstance(bits, int) else list(bits)
    for b in widths:
        if not 1 <= b <= 24:
            raise FormatError(f"{b} bits per code (allowed: 1 to 24)")
    widths = widths * (8 // math.gcd(sum(widths), 8))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return starts, widths, sum(widths) // 8


def pack(codes: Int[Array, "*batch n"], bits: Bits) -> UInt8[Array, "*batch m"]:
    """Codes in `[0, 2**bits)`, int32, to bytes `[..., ceil(n*bits/8)]`."""
    n, (starts, widths, size) = codes.shape[-1], _period(bits)
    u = codes.astype(jnp.uint32)
    pad = -n % len(widths)
    if pad:
        u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, pad)])
    u = u.reshape(*u.shape[:-1], -1, len(widths))
    words = []
    for j in range(size):
        word = jnp.zeros(u.shape[:-1], jnp.uint32)
        for i, (start, width) in enumerate(zip(starts, widths)):
            shift = start - 8 * j  # where code i starts, relative to byte j
            if -width < shift < 8:
                word = word | (u[..., i] << shift if shift >= 0 else u[..., i] >> -shift)
        words.append((word & 0xFF).astype(jnp.uint8))
    out = jnp.stack(words, axis=-1)
    return out.reshape(*out.shape[:-2], -1)[..., : packed_size(n, bits)]


def unpack(packed: UInt8[Array, "*batch m"], bits: Bits, n: int) -> Int[Array, "*batch n"]:
    """The first `n` codes of each row, int32; inverse of `pack`."""
    starts, widths, size = _period(bits)
    if packed.shape[-1] != packed_size(n, bits):
        raise FormatError(
            f"packed rows of {packed.shape[-1]} bytes ({n} codes of {bits} bits take {packed_size(n, bits)})"
        )
    u = packed.astype(jnp.uint32)
    pad = -u.shape[-1] % size
    if pad:
        u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, pad)])
    u = u.reshape(*u.shape[:-1], -1, size)
    codes = []
    for start, width in zip(starts, widths):
        j, shift = divmod(start, 8)
        word = u[..., j] >> shift
        for more in range(1, -(-(shift + width) // 8)):
            word = word | (u[..., j + more] << (8 * more - shift))
        codes.append(word & ((1 << width) - 1))
    out = jnp.stack(codes, axis=-1)
    return out.reshape(*out.shape[:-2], -1)[..., :n].astype(jnp.int32)

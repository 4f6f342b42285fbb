"""The bitshift trellis and its best path (QTIP, arXiv 2406.11235, sections 3.1 and 3.2).

A state has L bits. A step shifts some bits u in, `s' = (s << bits | u) mod 2^L`, and gives V values, `code(s')`; over a
tile the u of all steps are the stored bits, and the state is a window over them. Tail-biting closes the circle: the
window of the first steps reaches into the last ones, and no bits but the u are stored.

All states `s` with the same `s >> bits` come from the same states, so a step has 2^L sums and one minimum over the
states that a next step will not tell apart, not 2^(L + bits):

    e[s]   = old[s >> bits] + |code(s) - x|^2
    new[j] = min over c of e[c 2^(L - bits') + j]        bits': of the next step

which takes reshapes, no gather: only the 2^(L - bits) minima are carried, with `c` in the low bits of the float, so the
minimum is one of integers and the way back is known from it (a byte for each).

The path must not depend on the program that it is compiled in. `|code - x|^2 = (code^2 - 2 x code) + x^2` has products
that are exact in float32 (x is rounded to 12 significant bits, values of codes have at most 11), so a compiler may
contract them with the sums or not. What all states have in common is taken away, so that an outlier does not swallow
the costs of its neighbours.

Measured on two cores with AVX-512 (L = 16, 2 bits): tiles as the last axis, 64 at once, 3 ms of CPU for a pass over 256
weights; 16 at once 3.7. The next step's inputs are carried: a slice of all of them, fused into the sums, makes those a
scalar program (14 ms).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

MEMORY = 256 * 2**20  # bytes of back-pointers at once
UNROLLED = 32  # branches of a minimum that are written out; a reduction beyond


class Trellis(NamedTuple):
    """Bits of a state, bits that each step shifts in (a cycle of one or two), and values that a step gives.

    Two widths n and n + 1 give half-integer rates. A path has whole cycles. Back-pointers are bytes: at most 8 bits.
    """

    L: int
    widths: tuple[int, ...]
    V: int = 1

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return sum(self.widths) / len(self.widths) / self.V


def short(x: Float[Array, "*s"], bits: int = 12, up: bool = False) -> Float[Array, "*s"]:
    """Rounded to `bits` significant bits, half to even, or away from 0."""
    drop = 24 - bits
    u = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    tie = np.uint32((1 << drop) - 1) if up else np.uint32((1 << (drop - 1)) - 1) + ((u >> drop) & 1)
    return lax.bitcast_convert_type((u + tie) & np.uint32(2**32 - (1 << drop)), jnp.float32)


def batch_of(trellis: Trellis, steps: int, memory: int = MEMORY) -> int:
    """Tiles that one program holds at once: enough for long vectors, within `memory` bytes of back-pointers."""
    per_tile = steps * 2 ** (trellis.L - min(trellis.widths))
    return max(1, min(2 ** max(22 - trellis.L, 4), memory // per_tile))


@partial(jax.jit, static_argnames=("trellis", "free"))
def viterbi(
    trellis: Trellis,
    table_VS: Float[Array, "V S"],
    x_BNV: Float[Array, "B N V"],
    overlap_B: Int[Array, " B"],
    free: bool = False,
) -> Int[Array, "B N"]:
    """States of the path of least squared error, int32.

    `table`: what each of the 2^L states gives, of at most 11 significant bits. `overlap`: the `L - widths[0]` bits that
    the last state leaves to the first, whose highest bits they are; `free`: any, and the ends need not fit (`overlap`
    is not looked at).
    """
    L, widths, V = trellis
    B, N, _ = x_BNV.shape
    P = len(widths)
    top_V = jnp.max(jnp.abs(table_VS), axis=1)
    x_NVB = rearrange(short(x_BNV), "b n v -> n v b")
    # x^2, less the square of how far x lies beyond all codes: what keeps costs positive.
    far = jnp.abs(x_NVB) - top_V[:, None]
    lift_NVB = jnp.where(far > 0, short(top_V[:, None] * (jnp.abs(x_NVB) + far), up=True), x_NVB**2)
    lift_NB = sum(lift_NVB[:, v] for v in range(V))
    power_VS, twice_VS = table_VS**2, 2 * table_VS
    inputs = jax.tree.map(lambda a: a.reshape(N // P, P, *a.shape[1:]), (x_NVB, lift_NB))

    def step(packed_GB: Array, x_VB: Array, lift_B: Array, bits: int, after: int) -> Array:
        old_GB = lax.bitcast_convert_type(packed_GB & np.int32(-(1 << bits)), jnp.float32) + lift_B
        C, J, R = 1 << after, 1 << (L - after), 1 << bits
        keep = np.int32(-C)

        def cost(lo: int, hi: int) -> Array:  # of the states lo..hi, as integers
            e = old_GB[lo // R : hi // R, None, :]
            for v in range(V):
                power, twice = (a[v, lo:hi].reshape(-1, R, 1) for a in (power_VS, twice_VS))
                e = e + (power - x_VB[v] * twice)
            return lax.bitcast_convert_type(e, jnp.int32).reshape(hi - lo, B)

        if C <= UNROLLED and J % R == 0:
            best_JB = None
            for c in range(C):
                e = (cost(c * J, (c + 1) * J) & keep) | c
                best_JB = e if best_JB is None else jnp.minimum(best_JB, e)
            return best_JB
        e_CJB = cost(0, C * J).reshape(C, J, B) & keep
        return jnp.min(e_CJB | lax.broadcasted_iota(jnp.int32, e_CJB.shape, 0), axis=0)

    always = lift_NB[0, 0] >= 0

    def cycle(carry, after):
        packed, (x_PVB, lift_PB) = carry
        back = []
        for p in range(P):
            back.append((packed & np.int32((1 << widths[p]) - 1)).astype(jnp.uint8))
            ends = (widths[p], widths[(p + 1) % P])
            if P == 1:
                packed = step(packed, x_PVB[p], lift_PB[p], *ends)
            else:  # fused into both of its uses, a step within the cycle would be computed twice, and slowly
                none = jnp.zeros((1 << (L - ends[1]), B), jnp.int32)
                take = partial(lambda packed, p, ends: step(packed, x_PVB[p], lift_PB[p], *ends), p=p, ends=ends)
                packed = lax.cond(always, take, lambda packed, none=none: none, packed)
        return (packed, after), tuple(back)

    G = 1 << (L - widths[0])
    start_GB = jnp.zeros((G, B), jnp.int32)
    if not free:
        infinite = np.float32(np.inf).view(np.int32)
        start_GB = jnp.where(jnp.arange(G)[:, None] == overlap_B, start_GB, infinite)
    first = jax.tree.map(lambda a: a[0], inputs)
    (packed_GB, _), back = lax.scan(cycle, (start_GB, first), jax.tree.map(lambda a: jnp.roll(a, -1, 0), inputs))
    lanes = jnp.arange(B)
    mask = np.int32((1 << widths[0]) - 1)
    if free:
        overlap_B = jnp.argmin(packed_GB & ~mask, axis=0).astype(jnp.int32)
    s_B = ((packed_GB[overlap_B, lanes] & mask) << (L - widths[0])) | overlap_B

    def backward(i, carry):
        s_B, states_NB = carry
        for p in reversed(range(P)):
            n = N - P * (i + 1) + p
            states_NB = lax.dynamic_update_index_in_dim(states_NB, s_B, n, 0)
            # The pointers beside step n say how the state before it was reached. There is none before the first.
            j = s_B >> widths[p]
            s_B = (back[p][N // P - 1 - i, j, lanes].astype(jnp.int32) << (L - widths[p])) | j
        return s_B, states_NB

    return lax.fori_loop(0, N // P, backward, (s_B, jnp.zeros((N, B), jnp.int32)))[1].T


@partial(jax.jit, static_argnames=("trellis", "batch", "around"))
def tail_biting(
    trellis: Trellis,
    table_VS: Float[Array, "V S"],
    x_ZNV: Float[Array, "Z N V"],
    batch: int = 0,
    around: int = 0,
) -> Int[Array, "Z N"]:
    """States of a closed path through each tile, int32, by QTIP's Algorithm 4: a path with free ends through the tile
    turned by half says what the ends have in common, and the second is the best one that has it.

    The first goes over `around` steps on either side of the ends; 0 is half of the tile on either, which is QTIP's
    choice. Less costs quality, more (up to N) gains a little: docs/vq_trellis.md. `batch` tiles are held at once (0:
    `batch_of`).
    """
    Z, N, V = x_ZNV.shape
    P, half = len(trellis.widths), N // 2
    half -= half % P
    near = min(N, around - around % P) if around else half
    batch = -(-Z // -(-Z // (batch or batch_of(trellis, N))))
    x_ZNV = jnp.pad(x_ZNV, ((0, -Z % batch), (0, 0), (0, 0)))

    def one(x_BNV: Array) -> Array:
        turned = jnp.concatenate([x_BNV[:, N - near :], x_BNV[:, : (near if around else N - near)]], axis=1)
        none = jnp.zeros(x_BNV.shape[0], jnp.int32)
        overlap_B = viterbi(trellis, table_VS, turned, none, free=True)[:, near] >> trellis.widths[0]
        return viterbi(trellis, table_VS, x_BNV, overlap_B)

    states = lax.map(one, x_ZNV.reshape(-1, batch, N, V)) if len(x_ZNV) > batch else one(x_ZNV)
    return states.reshape(-1, N)[:Z]


# -- bits -------------------------------------------------------------------------------------------------------------


def inputs_of(trellis: Trellis, states_ZN: Int[Array, "*Z N"]) -> Int[Array, "*Z N"]:
    """The bits that each step shifted in."""
    masks = np.array([(1 << b) - 1 for b in trellis.widths], np.int32)
    return states_ZN & jnp.asarray(np.resize(masks, states_ZN.shape[-1]))


def states_of(trellis: Trellis, inputs_ZN: Int[Array, "*Z N"]) -> Int[Array, "*Z N"]:
    """All states of closed paths from the bits that their steps shifted in, in parallel; inverse of `inputs_of`."""
    L, widths, _ = trellis
    u = rearrange(inputs_ZN.astype(jnp.uint32), "... (n p) -> ... n p", p=len(widths))
    total = sum(widths)
    word = jnp.zeros(u.shape[:-1], jnp.uint32)
    for p, bits in enumerate(widths):
        word = (word << bits) | u[..., p]
    window, have = word, 1  # of the last `have` cycles; doubles until it is long enough
    while have * total < L:
        window = window | (jnp.roll(window, have, axis=-1) << (have * total))
        have *= 2
    window = jnp.roll(window, 1, axis=-1)  # what lies before the cycle
    states = []
    for p, bits in enumerate(widths):
        window = (window << bits) | u[..., p]
        states.append(window & np.uint32((1 << L) - 1))
    return rearrange(jnp.stack(states, axis=-1), "... n p -> ... (n p)").astype(jnp.int32)


def states_at(
    trellis: Trellis, stream_ZM: UInt8[Array, "*Z M"], steps_K: Int[Array, " K"], n: int
) -> Int[Array, "*Z K"]:
    """States of the given steps alone, out of a tile's bytes as `Trellis` formats store them: the little-endian number
    whose lowest bits are those of the last of `n` steps. A state is its L bits from where its step's begin."""
    total, P = sum(trellis.widths), len(trellis.widths)
    after = n - 1 - steps_K  # steps whose bits lie below
    low = np.cumsum([0, *reversed(trellis.widths)])[:P]
    at = after // P * total + jnp.asarray(low)[after % P]
    word = jnp.zeros((*stream_ZM.shape[:-1], len(steps_K)), jnp.uint32)
    for i in range(4):
        byte = jnp.take(stream_ZM, (at // 8 + i) % stream_ZM.shape[-1], axis=-1).astype(jnp.uint32)
        word = word | (byte << (8 * i))
    return ((word >> (at % 8).astype(jnp.uint32)) & np.uint32((1 << trellis.L) - 1)).astype(jnp.int32)

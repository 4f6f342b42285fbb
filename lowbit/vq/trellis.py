"""Trellis-coded weights, `trellisK:CODE[:lL][:vV]`: QTIP (arXiv 2406.11235) and EXL3 without their rotations.

A tile of 16 x 16 weights is a closed path of 256 / V steps through a trellis of 2^L states (`lowbit.vq.viterbi`); what
is stored are the K V bits that each step shifts in, so K bits per weight, and one scale for the matrix:

    codes = bits of the best path of w / scale          w_hat = code(states(codes)) * scale

The order of the weights in a path is EXL3's, that of a tensor core's fragments; with key `qtip` it is that of QTIP's
kernel (which takes the two halves of the rows last, EXL3 those of the columns); with `rows` it goes row by row, as QTIP
has it where it has no kernel. The bits of a path are one little-endian number, the
last step's lowest: the state of a step is the L bits from where its own begin, circularly, so any weight can be decoded
alone, and the number's uint32 words from the last to the first are EXL3's own (`lowbit.vq.trellis_pack`).

K is a whole or half number from 1 to 8. Half ones alternate steps of n and n + 1 bits at V = 1; at V = 2 a step has an
odd number of bits. A step has at most 8 bits.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.floats import LARGEST, SMALLEST_SCALE, power_of_two, round_to
from lowbit.formats.packing import pack, packed_size, unpack
from lowbit.formats.reduce import order_free_mean
from lowbit.vq.trellis_codes import CODES, COMPUTED, codebook_of, rms_of, rows_of, values
from lowbit.vq.viterbi import Trellis, inputs_of, short, states_of, tail_biting

SIDE, T = 16, 256
AROUND = 0  # steps of the first pass on either side of the ends; 0: all
# RMS of the input over RMS of the code that gives the least error of normal weights, by bits (docs/vq_trellis.md).
RATIOS = {1: 1.15, 1.5: 1.05, 2: 1.0, 2.5: 0.95, 3: 0.95, 3.5: 0.925, 4: 0.9, 5: 0.9, 6: 0.85, 8: 0.8}
HYB_RATIOS = {1: 1.15, 2: 1.0, 3: 0.9, 4: 0.8}
ORDERS = {
    "exl3": "(r h p) (c k m l) -> r (c p m h k l)",
    "qtip": "(r h p) (c k m l) -> r (c p m k h l)",
    "rows": "(r h p) (c k m l) -> r (c h p k m l)",
}


@dataclasses.dataclass(frozen=True)
class TrellisFormat(Format):
    """Tiles of 16 x 16 weights as closed paths through a trellis, times one scale; see the module.

    Parameters: `scale`, float32 `[1, 1]`, stored with 12 significant bits so that products are exact in float32, and
    for `hyb`, `lut` and `latin` `codebook`, `[2^9, 2]`, `[2^L, V]` and `[2^10, 1]`, stored in fp16. Codes are int32
    `[O/16, I/16 * 256/V]`, a step's bits each, a tile's last step first. Gradients: a weight's passes; the scale's is
    `level - w/scale`, and `level` of weights beyond the code's largest value (LSQ's rule, arXiv 1902.08153); a codebook
    entry's is the sum over the weights that it stands for, times the scale.
    """

    K: float = 2.0
    code: str = "mcg"
    L: int = 16
    V: int = 1
    order: str = "exl3"

    @property
    def name(self) -> str:
        keys = [self.code, *[f"l{self.L}"] * (self.L != 16), *[f"v{self.V}"] * (self.V != _default_v(self.code))]
        return ":".join([f"trellis{self.K:g}", *keys, *[self.order] * (self.order != "exl3")])

    @property
    def tile(self) -> tuple[int, int]:
        return (SIDE, SIDE)

    @property
    def trellis(self) -> Trellis:
        bits = self.K * self.V
        return Trellis(self.L, (int(bits),) if bits == int(bits) else (int(bits), int(bits) + 1), self.V)

    @property
    def codebook(self) -> Float[np.ndarray, "R V"] | None:
        """The table that `init` starts with."""
        return codebook_of(self.code, self.L, self.V)

    @property
    def ratio(self) -> float:
        """RMS of the weights, in units of the scale, over RMS of the code: `init`'s choice."""
        ratios = HYB_RATIOS if self.code == "hyb" else RATIOS
        return float(np.interp(self.K, list(ratios), list(ratios.values())))

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or min(shape) < 1 or shape[0] % SIDE or shape[1] % SIDE:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (both sides must be multiples of {SIDE})")
        book = self.codebook
        if book is not None and 2 * book.size > 2 * shape[0] * shape[1]:
            raise FormatError(
                f"{self.name}: codebook of {2 * book.size} bytes for a weight of shape {tuple(shape)} "
                f"(must not be larger than the weight in bf16, {2 * shape[0] * shape[1]} bytes)"
            )

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        if "codebook" in params and not float(jnp.max(jnp.abs(params["codebook"]))) <= LARGEST["fp16"]:
            raise FormatError(f"{self.name}: codebook entries beyond fp16 (largest: {LARGEST['fp16']:g})")

    # -- parameters ---------------------------------------------------------------------------------------------------

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """The scale that suits normal weights of the RMS of `w` (`stats` is not used), and the code's own codebook."""
        unit = jnp.maximum(power_of_two(jnp.max(jnp.abs(w_OI))), SMALLEST_SCALE["f32"])
        square = order_free_mean(rearrange(jnp.square(w_OI / unit), "o i -> o 1 i"), over_rows=True)
        factor = np.float32(1 / (self.ratio * rms_of(self.code, self.trellis)))
        params = {"scale": jnp.sqrt(square) * factor * unit}
        book = self.codebook
        return params if book is None else {**params, "codebook": jnp.asarray(book)}

    def stored(self, params: Params) -> Params:
        out = {"scale": jnp.maximum(short(params["scale"]), np.float32(SMALLEST_SCALE["f32"]))}
        if "codebook" in params:
            out["codebook"] = round_to(params["codebook"], "fp16")
        return out

    def table(self, stored: Params) -> Float[Array, "V S"]:
        """What the 2^L states give, in units of the scale."""
        states = jnp.arange(2**self.L, dtype=jnp.int32)
        return values(self.code, self.trellis, states, stored.get("codebook"))

    # -- codes --------------------------------------------------------------------------------------------------------

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "R N"]:
        x_ZNV = self.paths(w_OI / stored["scale"])
        states = tail_biting(self.trellis, self.table(stored), x_ZNV, around=AROUND)
        return rearrange(inputs_of(self.trellis, states)[:, ::-1], "(r c) n -> r (c n)", r=w_OI.shape[0] // SIDE)

    def dequantize(self, codes_RN: Int[Array, "R N"], stored: Params) -> Float[Array, "O I"]:
        return self._levels(codes_RN, stored) * stored["scale"]

    def states(self, codes_RN: Int[Array, "R N"]) -> Int[Array, "Z N2"]:
        """States of each tile's path, in the order of its steps."""
        return states_of(self.trellis, rearrange(codes_RN, "r (c n) -> (r c) n", n=T // self.V)[:, ::-1])

    def _levels(self, codes_RN: Int[Array, "R N"], stored: Params) -> Float[Array, "O I"]:
        x_VZN = values(self.code, self.trellis, self.states(codes_RN), stored.get("codebook"))
        return self.weights(jnp.moveaxis(x_VZN, 0, -1), codes_RN.shape[0])

    def paths(self, w_OI: Float[Array, "O I"]) -> Float[Array, "Z N V"]:
        """Each tile's weights in the order of its path."""
        w_RX = rearrange(w_OI, ORDERS[self.order], h=2, p=8, k=2, m=4, l=2)
        return rearrange(w_RX, "r (c n v) -> (r c) n v", n=T // self.V, v=self.V)

    def weights(self, x_ZNV: Float[Array, "Z N V"], rows: int) -> Float[Array, "O I"]:
        """Inverse of `paths`; `rows` of tiles."""
        there, back = ORDERS[self.order].split(" -> ")
        x_RX = rearrange(x_ZNV, "(r c) n v -> r (c n v)", r=rows)
        return rearrange(x_RX, f"{back} -> {there}", h=2, p=8, k=2, m=4, l=2)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def pack(self, codes_RN: Int[Array, "R N"], stored: Params) -> dict[str, Array]:
        arrays = {"codes": pack(codes_RN, self.trellis.widths[::-1]), "scale": stored["scale"]}
        return arrays | ({"codebook": stored["codebook"].astype(jnp.float16)} if "codebook" in stored else {})

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "R N"], Params]:
        """Raises `FormatError` for arrays of other shapes than `pack` gives for a weight of this one."""
        widths, n = self.trellis.widths[::-1], shape[1] // SIDE * (T // self.V)
        book = self.codebook
        want = {"codes": (shape[0] // SIDE, packed_size(n, widths)), "scale": (1, 1)}
        want |= {} if book is None else {"codebook": book.shape}
        for k, size in want.items():
            if k not in arrays or tuple(arrays[k].shape) != size:
                got = list(arrays[k].shape) if k in arrays else "none"
                what = f"array {k} of shape {got} for a weight {list(shape)}"
                raise FormatError(f"{self.name}: {what} (must be {list(size)})")
        stored = {k: arrays[k].astype(jnp.float32) for k in want if k != "codes"}
        return unpack(arrays["codes"], widths, n), stored

    # -- gradient -----------------------------------------------------------------------------------------------------

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        stored = self.stored(params)
        codes_RN = self.quantize(w_OI, stored)
        level, ratio = self._levels(codes_RN, stored), w_OI / stored["scale"]
        top = jnp.max(jnp.abs(self.table(stored)))
        each = g_OI * (level - jnp.where(jnp.abs(ratio) <= top, ratio, 0.0))
        grads = {"scale": jnp.sum(each)[None, None]}
        if "codebook" in params:
            rows_ZN, factor_ZNV = rows_of(self.code, self.trellis, self.states(codes_RN))
            g_ZNV = self.paths(g_OI * stored["scale"]) * factor_ZNV
            grads["codebook"] = jnp.zeros_like(params["codebook"]).at[rows_ZN].add(g_ZNV)
        return g_OI, grads


# -- names ------------------------------------------------------------------------------------------------------------

RATES = [k / 2 for k in range(2, 17)]


def _default_v(code: str) -> int:
    return 2 if code == "hyb" else 1


def _parser(K: float):
    family = f"trellis{K:g}"

    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = {}
        for key in keys:
            if key in CODES:
                kind, value = "code", key
            elif key in ORDERS:
                kind, value = "order", key
            elif m := re.fullmatch(r"([lv])(\d{1,2})", key):
                kind, value = m[1].upper(), int(m[2])
            else:
                raise FormatError(str(unknown(f"key of {family}", key, [*CODES, *ORDERS, "l16", "v1"])))
            if kind in found:
                raise FormatError(f"{family}: key {key!r} gives a second {kind} (allowed: one)")
            found[kind] = value
        if "code" not in found:
            raise FormatError(f"{family} without a code (allowed: {', '.join(CODES)})")
        found = {"V": _default_v(found["code"]), **found}
        _check(family, K, **found)
        return TrellisFormat(K, **found)

    return parse


def _check(family: str, K: float, code: str, V: int, L: int = 16, order: str = "exl3") -> None:
    allowed = [1] if code in (*COMPUTED, "latin") else [2] if code == "hyb" else [1, 2, 4]
    if V not in allowed:
        raise FormatError(f"{family}: v{V} of code {code!r} (allowed: {', '.join(f'v{v}' for v in allowed)})")
    most = int(-(-K * V // 1))
    if most > 8:
        raise FormatError(f"{family}: steps of {V} values and {most} bits (allowed: up to 8 bits)")
    least = max(4, 2 * most if code == "latin" else most)
    if not least <= L <= 20:
        raise FormatError(f"{family}: l{L} (allowed: l{least} to l20)")


_EXAMPLES = {
    1: ["trellis1:3inst:l10"],
    2: ["trellis2:mcg:l10", "trellis2:1mad:l10", "trellis2:hyb:l10", "trellis2:lut:l8:v2"],
    2.5: ["trellis2.5:mul1:l10"],
    3: ["trellis3:hyb:l10:qtip"],
    4: ["trellis4:mul1:l10:qtip", "trellis4:latin:l10"],
}
for _K in RATES:
    register(f"trellis{_K:g}", _parser(_K), _EXAMPLES.get(_K, []))

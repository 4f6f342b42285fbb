"""EXL3's layout (exllamav3, `quant_method` "exl3"), for `rht128:trellisK:CODE` with the codes `3inst`, `mcg`, `mul1`.

    y = svh * H(H(x * suh) Q)      H: Hadamard transforms of 128 values each, orthonormal; Q the trellis' values

Of each weight `PATH`: `PATH.trellis` int16 `[I / 16, O / 16, 16 K]` (`lowbit.vq.trellis_pack`); `PATH.suh` `[I]` and
`PATH.svh` `[O]`, fp16; `PATH.mcg` or `PATH.mul1`, an int32 scalar that holds the code's multiplier, none for `3inst`.
Rates may differ between weights.

There is no scale beside the vectors, so ours goes into them: as two fp16 numbers, one in each, whose product it is to
2^-18 (signs), or into `svh`, rounded to fp16 (`f16`; 2^-11). Read back, the format is `rht128:f16:...`, with scale 1.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lowbit.errors import InputError
from lowbit.formats.base import Format, FormatError, QTensor, get
from lowbit.vq import trellis_pack
from lowbit.vq.layouts.base import (
    ROUNDED,
    Arrays,
    Entry,
    Layout,
    Shape,
    Written,
    codes_of,
    factors,
    packed,
    signs,
    to_half,
    why_not_rotated,
)
from lowbit.vq.trellis import SIDE, T, TrellisFormat

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
CODES = ("3inst", *MULTIPLIERS)
VERSION = "1.4.1"  # of exllamav3 that the layout was described from


class Exl3(Layout):
    """See the module."""

    name = "exl3"
    allowed = "rht128:trellisK:3inst, :mcg or :mul1, K whole, L 16"

    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        if why := why_not_rotated(fmt, shape, 128):
            return why
        inner = fmt.inner
        if not isinstance(inner, TrellisFormat) or inner.code not in CODES:
            return "it has none of EXL3's codes"
        if inner.K != int(inner.K):
            return f"{inner.K:g} bits are no whole number"
        if inner.L != 16:
            return f"its trellis has L {inner.L}"
        return None if inner.order == "exl3" else f"its tiles are in the order {inner.order!r}"

    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        sizes = {path: shape[0] * shape[1] for path, (_, shape) in packed.items()}
        bits = {path: fmt.inner.K for path, (fmt, _) in packed.items()}
        body = [path for path in packed if path != "lm_head"] or list(packed)
        mean = sum(bits[p] * sizes[p] for p in body) / sum(sizes[p] for p in body)
        quant = {
            "quant_method": "exl3",
            "version": VERSION,
            "bits": int(mean) if mean == int(mean) else round(mean, 4),
            "head_bits": int(bits.get("lm_head", 16)),
            "codebook": packed[body[0]][0].inner.code,
        }
        return {"quantization_config": quant}

    def tensors(self, q: QTensor) -> Arrays:
        inner, (codes, stored) = q.format.inner, codes_of(q)
        su, sv, scale = signs(stored)
        width = int(inner.K)
        states = trellis_pack.states_of_codes(codes, width, inner.L, T)
        a, b = factors(scale)
        if q.format.trained:
            a = 2.0 ** np.round(np.log2(scale) / 2)
            b = scale / a
        out = {
            "trellis": trellis_pack.to_exl3(states, width, q.shape),
            "suh": to_half(su * a, "suh"),
            "svh": to_half(sv * b, "svh"),
        }
        if inner.code in MULTIPLIERS:
            out[inner.code] = np.array(MULTIPLIERS[inner.code], np.uint32).view(np.int32)
        return out

    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        out = {}
        for path, (O, I) in shapes.items():
            if not any(f"{path}.{name}" in stored for name in ("trellis", "suh", "svh")):
                continue
            codes = [code for code in MULTIPLIERS if f"{path}.{code}" in stored]
            if len(codes) == 2:
                raise InputError(f"{path} has markers of two codes, mcg and mul1 (allowed: one)")
            name = f"{path}.trellis"
            words = stored.shape(name)[-1] if name in stored and stored.shape(name) else SIDE
            if words % SIDE or not 1 <= words // SIDE <= 8:
                raise InputError(f"tensor {name} has {words} words a tile (allowed: 16 K, K from 1 to 8)")
            if O % 128 or I % 128:
                raise InputError(f"{path} of shape {[O, I]} in EXL3's layout (allowed: multiples of 128)")
            fmt = get(f"rht128:f16:trellis{words // SIDE}:{codes[0] if codes else '3inst'}")
            tensors = {"trellis": ((I // SIDE, O // SIDE, words), "int16")}
            tensors |= {"suh": ((I,), "float16"), "svh": ((O,), "float16")} | {code: ((), "int32") for code in codes}
            out[path] = Entry(fmt, tensors, partial(_load, fmt, (O, I)))
        return out

    def slack(self, w_OI: np.ndarray) -> np.ndarray:
        size = np.abs(w_OI)
        return size * np.float32(2.0**-11) + size.max() * np.float32(ROUNDED)

    def files(self, config: dict[str, Any], written: Mapping[str, Mapping[str, Written]]) -> dict[str, Any]:
        storage = {}
        for path, arrays in written.items():
            own: dict[str, Any] = {"stored_tensors": {}}
            for name, (shape, dtype, size) in arrays.items():
                entry = {"shape": list(shape), "n_bytes": size, "dtype": f"torch.{dtype}"}
                own["stored_tensors"][f"{path}.{name}"] = entry
            own |= {"quant_format": "exl3", "bits_per_weight": arrays["trellis"][0][-1] // SIDE}
            storage[path] = own | {f"{code}_multiplier": m for code, m in MULTIPLIERS.items() if code in arrays}
        return {"quantization_config.json": config["quantization_config"] | {"tensor_storage": storage}}


def _load(fmt: Format, shape: Shape, arrays: Arrays) -> QTensor:
    inner = fmt.inner
    if inner.code in MULTIPLIERS and (found := int(arrays[inner.code].view(np.uint32))) != MULTIPLIERS[inner.code]:
        raise FormatError(f"{inner.code} has multiplier {found:#x} (allowed: {MULTIPLIERS[inner.code]:#x})")
    states = trellis_pack.from_exl3(arrays["trellis"], int(inner.K))
    codes = trellis_pack.codes_of_states(states, int(inner.K), shape[0] // SIDE)
    stored = {"scale": np.ones((1, 1)), "su": arrays["suh"][None], "sv": arrays["svh"][:, None]}
    return packed(fmt, shape, codes, stored)

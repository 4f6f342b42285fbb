"""QTIP's layout (`quip_params` with a `decode_mode` in `config.json`), for `rht:trellisK:CODE:ORDER`.

    y = SV * H(Q H(x * SU))      H: Hadamard transforms of the full width, orthonormal; Q the trellis' values

Of each weight `PATH`: `PATH.trellis` int16 `[O I / 256, 16 K]` (`lowbit.vq.trellis_pack`); `PATH.SU` `[I]`, fp16;
`PATH.SV` `[O]`, float32; `PATH.tlut` fp16, the codes' table if they have one; `PATH.rcp` 0 and `PATH.tp_rank` 8, int64
scalars that belong to a split over devices. One code for the model, one K but for `v_proj`, `skip_list` names the
linears that keep their weight.

| code | order | `decode_mode` |
|---|---|---|
| `hyb`, 2 to 4 bits, L 16 | `qtip` (it has a kernel) | `quantlut_sym` |
| `hyb` otherwise, `lut`, `1mad`, `3inst` | `rows` | `quantlut_sym`, `lut`, `1mad`, `3inst` |

The scale goes into `SV`: a product of 12 and 11 significant bits, exact in float32, from which reading back finds both
factors again. With `1mad` it takes the code's unit along, and is rounded to float32.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lowbit.errors import InputError, unknown
from lowbit.formats.base import Format, FormatError, QTensor, get
from lowbit.vq import trellis_pack
from lowbit.vq.layouts.base import (
    ROUNDED,
    Arrays,
    Entry,
    Layout,
    Shape,
    check,
    codes_of,
    common_scale,
    inside_layers,
    packed,
    setting,
    signs,
    to_half,
    whole,
    why_not_rotated,
)
from lowbit.vq.trellis import SIDE, T, TrellisFormat
from lowbit.vq.trellis_codes import HYB_BITS, UNITS

WHERE = "quip_params"
MODES = {"hyb": "quantlut_sym", "lut": "lut", "1mad": "1mad", "3inst": "3inst"}
LINEARS = {
    f"{part}.{name}_proj": name
    for part, names in (("self_attn", "qkvo"), ("mlp", ("up", "gate", "down")))
    for name in names
}


class Qtip(Layout):
    """See the module."""

    name = "qtip"
    allowed = "rht:trellisK:hyb:qtip, or rht:trellisK:CODE:rows with 3inst, 1mad or lut, K whole"
    families = ("llama",)

    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        if why := why_not_rotated(fmt, shape, None):
            return why
        inner, inside = fmt.inner, inside_layers(path)
        if not isinstance(inner, TrellisFormat) or inner.code not in MODES:
            return "it has none of QTIP's codes"
        if not inside or inside[2] not in LINEARS:
            return "only linears inside layers are packed"
        if inner.K != int(inner.K):
            return f"{inner.K:g} bits are no whole number"
        if inner.order != _order(inner):
            why = "its kernel" if _order(inner) == "qtip" else "QTIP without a kernel for it"
            return f"its tiles are in the order {inner.order!r}, and {why} reads {_order(inner)!r}"
        if inner.order == "qtip" and any(n % 32 for n in shape):
            return f"shape {list(shape)} is no multiple of the kernel's 32"
        return None

    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        found: dict[str, dict[Any, str]] = {"code": {}, "K": {}, "K of v_proj": {}}
        for path, (fmt, _) in packed.items():
            inner = fmt.inner
            found["code"].setdefault((inner.code, inner.L, inner.V, inner.order), path)
            found["K of v_proj" if path.endswith("v_proj") else "K"].setdefault(int(inner.K), path)
        for what, values in found.items():
            if len(values) > 1:
                a, b = list(values.values())[:2]
                names = f"{b} is in {packed[b][0].name} and {a} in {packed[a][0].name}"
                raise InputError(f"{names} (allowed with target qtip: one {what})")
        (code, L, V, _) = next(iter(found["code"]))
        rates = [*found["K"], *found["K of v_proj"]]
        params = {
            "codebook": "bitshift",
            "codebook_version": 0,
            "L": L,
            "K": rates[0],
            "V": V,
            "tlut_bits": {"hyb": HYB_BITS, "lut": L}.get(code, 0),
            "decode_mode": MODES[code],
            "td_x": SIDE,
            "td_y": SIDE,
            "split_for_tp": False,
            "skip_list": [f"{m[1]}_{LINEARS[m[2]]}" for path in kept if (m := inside_layers(path))],
        }
        if found["K of v_proj"]:
            params["K_v_proj"] = next(iter(found["K of v_proj"]))
        return {WHERE: params}

    def tensors(self, q: QTensor) -> Arrays:
        inner, (codes, stored) = q.format.inner, codes_of(q)
        su, sv, scale = signs(stored)
        width = int(inner.K * inner.V)
        states = trellis_pack.states_of_codes(codes, width, inner.L, T // inner.V)
        words = trellis_pack.to_qtip(states, width, inner.L)
        if inner.order == "qtip":
            words = trellis_pack.to_qtip_kernel(words, q.shape)
        SV_O = (sv * (scale * UNITS.get(inner.code, 1.0))).astype(np.float32)
        _split(SV_O, inner.code)  # what could not be read back is refused before it is written
        out = {
            "trellis": words,
            "SU": to_half(su, "SU"),
            "SV": SV_O,
            "rcp": np.array(0, np.int64),
            "tp_rank": np.array(8, np.int64),
        }
        return out | ({"tlut": stored["codebook"].astype(np.float16)} if "codebook" in stored else {})

    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        params = raw[WHERE]
        codes = {mode: code for code, mode in MODES.items()}
        if not isinstance(params["decode_mode"], str) or params["decode_mode"] not in codes:
            raise unknown(f"decode_mode of {WHERE}", params["decode_mode"], codes)
        code = codes[params["decode_mode"]]
        L = setting(params, "L", lambda v: whole(v, 4, 20), "4 to 20", WHERE)
        V = setting(params, "V", lambda v: whole(v, 1, 4), "1, 2 or 4", WHERE)
        K = setting(params, "K", lambda v: whole(v, 1, 8), "1 to 8", WHERE)
        for key in ("td_x", "td_y"):
            setting(params, key, lambda v: v == SIDE, str(SIDE), WHERE)
        bits = HYB_BITS if code == "hyb" else L
        if code in ("hyb", "lut"):
            setting(params, "tlut_bits", lambda v: v == bits, str(bits), WHERE)
        rates = dict.fromkeys(LINEARS.values(), K)
        if "K_v_proj" in params:
            rates["v"] = setting(params, "K_v_proj", lambda v: whole(v, 1, 8), "1 to 8", WHERE)
        skip = setting(params, "skip_list", lambda v: v is None or isinstance(v, list), "a list or null", WHERE) or []
        out = {}
        for path, (O, I) in shapes.items():
            m = inside_layers(path)
            if not m or m[2] not in LINEARS or f"{m[1]}_{LINEARS[m[2]]}" in skip:
                continue
            own = rates[LINEARS[m[2]]]
            name = f"trellis{own}:{code}:l{L}:v{V}"
            fmt = get(f"rht:f16:{name}:{_order(get(name))}")
            check(path, fmt, (O, I))
            tensors = {"trellis": ((O * I // T, 16 * own), "int16"), "SU": ((I,), "float16"), "SV": ((O,), "float32")}
            tensors |= {"rcp": ((), "int64"), "tp_rank": ((), "int64")}
            if code in ("hyb", "lut"):
                tensors["tlut"] = ((2**bits, V), "float16")
            out[path] = Entry(fmt, tensors, partial(_load, fmt, (O, I)))
        return out

    def slack(self, w_OI: np.ndarray) -> float:
        return float(np.abs(w_OI).max()) * ROUNDED


def _order(inner: TrellisFormat) -> str:
    """Of the weights of a tile."""
    return "qtip" if (inner.code, inner.L, inner.V) == ("hyb", 16, 2) and 2 <= inner.K <= 4 else "rows"


def _load(fmt: Format, shape: Shape, arrays: Arrays) -> QTensor:
    inner = fmt.inner
    if (found := int(arrays["rcp"])) != 0:
        raise FormatError(f"rcp is {found}, a transform split over devices (allowed: 0)")
    split = _split(arrays["SV"], inner.code)
    words = arrays["trellis"]
    if inner.order == "qtip":
        words = trellis_pack.from_qtip_kernel(words, shape)
    width = int(inner.K * inner.V)
    codes = trellis_pack.codes_of_states(trellis_pack.from_qtip(words, width, inner.L), width, shape[0] // SIDE)
    stored = {"scale": np.full((1, 1), split[0]), "su": arrays["SU"][None], "sv": split[1][:, None]}
    if "tlut" in arrays:
        stored["codebook"] = arrays["tlut"]
    return packed(fmt, shape, codes, stored)


def _split(SV_O: np.ndarray, code: str) -> tuple[float, np.ndarray]:
    """The one scale and the fp16 signs that are `SV`. Raises `FormatError` where there are none."""
    sv = SV_O.astype(np.float64)
    if unit := UNITS.get(code):
        sv = _short(sv / unit, 23)
        if not np.array_equal((sv * unit).astype(np.float32), SV_O):
            sv = np.zeros(1)
    if (split := common_scale(sv)) is None:
        raise FormatError("SV is no fp16 vector times one number of 12 significant bits (allowed: what rht:f16 holds)")
    return split


def _short(x: np.ndarray, bits: int) -> np.ndarray:
    """Rounded to so many significant bits."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2**bits) / 2**bits, exponent)

"""QuIP#'s layout (quip-sharp, `quip_params` in `config.json`), for `rht:e8p2`, `rht:e8p3` and `rht:e8p4`.

    y = SV * H(Wscale Q H(x * SU))      H: Hadamard transforms of the full width, orthonormal

Of each weight `PATH`: `PATH.Qidxs` int64, the kernel's words (`lowbit.vq.e8.pack_gemv`) `[O, I / 32]`, after them on
the last axis those of the second stage (e8p3: `pack_gemv8`, `[O, I / 64]`); `PATH.SU` `[I]` and `PATH.SV` `[O]`, fp16;
`PATH.Wscale`, a float32 scalar; `PATH.codebook_id`, an int64 one. All are what is stored here, not rounded. The second
stage counts `1 / resid_scale_override`, for which the exact inverse of ours is written.

Read back, the format is `rht:f16:...`: signs are fp16 in the file.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lowbit.errors import InputError, unknown
from lowbit.formats.base import Format, FormatError, QTensor
from lowbit.vq.e8 import E8P, RESIDUAL, RHO, pack_gemv, pack_gemv8, unpack_gemv, unpack_gemv8
from lowbit.vq.incoherent import Incoherent
from lowbit.vq.layouts.base import (
    Arrays,
    Entry,
    Layout,
    Shape,
    check,
    codes_of,
    inside_layers,
    packed,
    same,
    setting,
    signs,
    to_half,
    why_not_rotated,
)

WHERE = "quip_params"
# Bits: name, number, version, codes of a word on average, and its own default of the second stage's scale.
CODEBOOKS = {
    2: ("E8P12", 7, 1, 4, -1),
    3: ("E8P12RVQ3B", 18, 0, 8 / 3, 2.04),
    4: ("E8P12RVQ4B", 17, 1, 2, 3.45),
}


class Quip(Layout):
    """See the module."""

    name = "quip"
    allowed = "rht:e8p2, rht:e8p3 or rht:e8p4"
    families = ("llama", "mistral")
    note = "QuIP#'s own Llama class joins q, k, v and up, gate before it rotates them; here they are apart"

    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        if why := why_not_rotated(fmt, shape, None):
            return why
        if not isinstance(fmt.inner, E8P):
            return "it has no E8P codes"
        if not inside_layers(path):
            return "only linears inside layers are packed"
        O, I = shape
        return f"shape {[O, I]} is no multiple of the kernel's 16 x 64" if O % 16 or I % 64 else None

    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        if plain := [path for path in kept if inside_layers(path)]:
            raise InputError(f"{plain[0]} is not packed (allowed with target quip: all linears inside layers)")
        width, residual = same(packed, lambda path, fmt: (fmt.inner.width, fmt.inner.residual), "e8pN")
        step = packed[next(iter(packed))][0].inner.step if residual else 0
        book, _, version, size, _ = CODEBOOKS[width]
        params = {
            "lora_rank": 0,
            "rescale_WH": False,
            "codebook": book,
            "codebook_version": version,
            "codesz": 8,
            "idx_dtype": "torch.int64",
            "packsz": size,
            "resid_scale_override": 1 / step if step else -1,
            "model_version": 1,
        }
        return {WHERE: params}

    def tensors(self, q: QTensor) -> Arrays:
        inner, (codes, stored) = q.format.inner, codes_of(q)
        su, sv, scale = signs(stored)
        words = [pack_gemv(codes & 0xFFFF)]
        if inner.width > 2:
            second = codes.view(np.uint32) >> 16
            words.append((pack_gemv8 if inner.width == 3 else pack_gemv)(second.astype(np.int32)))
        return {
            "Qidxs": np.concatenate(words, axis=1),
            "SU": to_half(su, "SU"),
            "SV": to_half(sv, "SV"),
            "Wscale": np.array(scale, np.float32),
            "codebook_id": np.array(CODEBOOKS[inner.width][1], np.int64),
        }

    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        params = raw[WHERE]
        names = {book: width for width, (book, *_) in CODEBOOKS.items()}
        if not isinstance(params.get("codebook"), str) or params["codebook"] not in names:
            raise unknown(f"codebook of {WHERE}", params.get("codebook"), names)
        setting(params, "lora_rank", lambda v: v == 0, "0", WHERE)
        setting(params, "rescale_WH", lambda v: v is False, "false", WHERE)
        width = names[params["codebook"]]
        if width == 2:
            inner = E8P()
        else:
            override = params.get("resid_scale_override", -1)
            scale = CODEBOOKS[width][4] if override == -1 else override
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= 16:
                raise InputError(f"{WHERE}: resid_scale_override is {override!r} (allowed: 1 to 16, or -1)")
            inner = E8P(width, RHO[width], _residual(width, scale))
        fmt, words = Incoherent(inner=inner, trained=True), {2: (4,), 3: (4, 8), 4: (4, 4)}[width]
        out = {}
        for path, (O, I) in shapes.items():
            if not inside_layers(path):
                continue
            if O % 16 or I % 64:
                raise InputError(f"{path} of shape {[O, I]} in QuIP#'s layout (allowed: multiples of 16 and 64)")
            check(path, fmt, (O, I))
            tensors = {
                "Qidxs": ((O, sum(I // 8 // n for n in words)), "int64"),
                "SU": ((I,), "float16"),
                "SV": ((O,), "float16"),
                "Wscale": ((), "float32"),
                "codebook_id": ((), "int64"),
            }
            out[path] = Entry(fmt, tensors, partial(_load, fmt, (O, I)))
        return out


def _residual(width: int, scale: float) -> float:
    """The shortest number that gives the format's second stage the same size."""
    step = E8P(width, residual=scale).step
    for digits in range(1, 10):
        if E8P(width, residual=(short := float(f"{scale:.{digits}g}"))).step == step:
            return RESIDUAL[width] if E8P(width, residual=RESIDUAL[width]).step == step else short
    return scale


def _load(fmt: Incoherent, shape: Shape, arrays: Arrays) -> QTensor:
    width, first = fmt.inner.width, shape[1] // 32
    if (found := int(arrays["codebook_id"])) != CODEBOOKS[width][1]:
        raise FormatError(f"codebook_id is {found} (allowed: {CODEBOOKS[width][1]})")
    words = arrays["Qidxs"]
    codes = unpack_gemv(words[:, :first])
    if width > 2:
        second = (unpack_gemv8 if width == 3 else unpack_gemv)(words[:, first:])
        codes = codes | second << 16
    stored = {"scale": arrays["Wscale"].reshape(1, 1), "su": arrays["SU"][None], "sv": arrays["SV"][:, None]}
    if not stored["scale"] > 0:
        raise FormatError(f"Wscale is {float(arrays['Wscale'])} (allowed: above 0)")
    return packed(fmt, shape, codes, stored)

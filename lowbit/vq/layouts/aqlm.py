"""AQLM's layout (its own library and `transformers`, `quant_method` "aqlm"), for `aqlm:MxB:gG`.

Of each weight `PATH`: `PATH.codes` `[O, I / G, M]`, int8 (B up to 8) or int16, codes modulo 2^B from -2^(B-1) on;
`PATH.codebooks` fp16 `[M, 2^B, 1, G]`; `PATH.scales` fp16 `[O, 1, 1, 1]`. They are what is stored here, not rounded
again. The configuration has one kind of codebook for all layers, and names the linears that keep their weight.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lowbit.errors import InputError
from lowbit.formats.base import Format, FormatError, QTensor
from lowbit.vq.additive import Additive
from lowbit.vq.layouts.base import Arrays, Entry, Layout, Shape, codes_of, packed, same, setting, whole

WHERE = "quantization_config"


class Aqlm(Layout):
    """See the module."""

    name = "aqlm"
    allowed = "aqlm:MxB:gG"

    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        return None if isinstance(fmt, Additive) else "it has no additive codebooks"

    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        fmt = same(packed, lambda path, fmt: fmt, "aqlm:MxB:gG")
        quant = {
            "quant_method": "aqlm",
            "nbits_per_codebook": fmt.bits,
            "num_codebooks": fmt.number,
            "out_group_size": 1,
            "in_group_size": fmt.size,
            # AQLM's own code compares names of weights, transformers from 5 on names of modules.
            "linear_weights_not_to_quantize": [name for path in kept for name in (path, f"{path}.weight")],
        }
        return {WHERE: quant}

    def tensors(self, q: QTensor) -> Arrays:
        fmt, (codes, stored) = q.format, codes_of(q)
        size = 2**fmt.bits
        signed = np.where(codes >= size // 2, codes - size, codes)
        books = stored["codebook"].astype(np.float16)  # [M, 1, K, G]
        return {
            "codes": signed.astype(_int(fmt)).reshape(q.shape[0], q.shape[1] // fmt.size, fmt.number),
            "codebooks": np.ascontiguousarray(books.transpose(0, 2, 1, 3)),
            "scales": stored["scale"].astype(np.float16).reshape(-1, 1, 1, 1),
        }

    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        quant = raw[WHERE]
        setting(quant, "out_group_size", lambda v: v == 1, "1", WHERE)
        bits = setting(quant, "nbits_per_codebook", lambda v: whole(v, 1, 16), "1 to 16", WHERE)
        number = setting(quant, "num_codebooks", lambda v: whole(v, 1, 8), "1 to 8", WHERE)
        size = setting(quant, "in_group_size", lambda v: whole(v, 1, 32), "1 to 32", WHERE)
        kept = setting(
            quant, "linear_weights_not_to_quantize", lambda v: isinstance(v, list), "a list of tensors", WHERE
        )
        fmt = Additive(number, bits, size)
        out = {}
        for path, (O, I) in shapes.items():
            if path == "model.embed_tokens" or path in kept or f"{path}.weight" in kept:
                continue
            if I % size:
                raise InputError(f"{WHERE}: in_group_size {size} for {path} of shape {[O, I]} (allowed: a divisor)")
            tensors = {
                "codes": ((O, I // size, number), str(np.dtype(_int(fmt)))),
                "codebooks": ((number, 2**bits, 1, size), "float16"),
                "scales": ((O, 1, 1, 1), "float16"),
            }
            out[path] = Entry(fmt, tensors, partial(_load, fmt, (O, I)))
        return out


def _int(fmt: Additive) -> type:
    return np.int8 if fmt.bits <= 8 else np.int16


def _load(fmt: Additive, shape: Shape, arrays: Arrays) -> QTensor:
    codes, size = arrays["codes"].astype(np.int32).reshape(shape[0], -1), 2**fmt.bits
    if codes.min() < -size // 2 or codes.max() >= size:
        bad = codes.min() if codes.min() < -size // 2 else codes.max()
        raise FormatError(f"code {bad} of a codebook of {size} vectors (allowed: {-size // 2} to {size - 1})")
    books = np.ascontiguousarray(arrays["codebooks"].transpose(0, 2, 1, 3))
    return packed(fmt, shape, codes % size, {"codebook": books, "scale": arrays["scales"].reshape(-1, 1)})

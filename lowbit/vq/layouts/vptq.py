"""VPTQ's layout (`quant_method` "vptq"), for `vptq:vV:kK[:rR][:s]`.

Of each weight `PATH`, with one group: `PATH.centroids.weight` fp16 `[1, K V]`; `PATH.indices` int32
`[1, O / V, ceil(I (b + r) / 32)]`, along each row a stream of words `residual << b | index` of b + r bits, least
significant bit first; with a residual `PATH.res_centroids.weight` fp16 `[1, R V]`; with column scales a `weight_scale`
`[I]` and a `weight_bias` of zeros. Its own reader masks a residual with the index's bits, so a residual of more
vectors than the codebook is refused. Outlier columns have another layout there, and are refused too.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowbit.errors import InputError
from lowbit.formats.base import Format, FormatError, QTensor, get
from lowbit.formats.packing import packed_size
from lowbit.vq.layouts.base import Arrays, Entry, Layout, Shape, codes_of, setting
from lowbit.vq.vector import Vector

WHERE = "quantization_config"


class Vptq(Layout):
    """See the module."""

    name = "vptq"
    allowed = "vptq:vV:kK[:rR][:s]"

    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        if not isinstance(fmt, Vector) or fmt.columns or fmt.rows:
            return "it has no codebook of vectors along the outputs for the whole weight"
        if fmt.outliers:
            return "outlier columns have another layout"
        if fmt.rest > fmt.entries:
            return "VPTQ's reader loses bits of a residual of more vectors than the codebook"
        return None

    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        layers = {path: _layer(fmt, shape) for path, (fmt, shape) in packed.items()}
        return {WHERE: {"quant_method": "vptq", "config_for_layers": layers, "modules_to_not_convert": kept}}

    def tensors(self, q: QTensor) -> Arrays:
        fmt, (_, stored) = q.format, codes_of(q)
        stream = np.asarray(q.arrays["codes"])  # the same, to whole bytes
        words = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4))).view("<i4")
        out = {"centroids.weight": stored["codebook"].astype(np.float16).reshape(1, -1), "indices": words[None]}
        if fmt.rest:
            out["res_centroids.weight"] = stored["residual"].astype(np.float16).reshape(1, -1)
        if fmt.column_scale:
            out["weight_scale"] = stored["scale"].astype(np.float16)[0]
            out["weight_bias"] = np.zeros(q.shape[1], np.float16)
        return out

    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        layers = setting(raw[WHERE], "config_for_layers", lambda v: isinstance(v, dict), "an object", WHERE)
        out = {}
        for path, layer in layers.items():
            if path not in shapes or path == "model.embed_tokens":
                raise InputError(f"{WHERE} describes {path}, which is no linear of the model")
            out[path] = _entry(path, layer, shapes[path])
        return out


def _layer(fmt: Vector, shape: Shape) -> dict[str, Any]:
    """An entry of `config_for_layers`; of pairs the first is for outlier columns, which there are none of."""
    return {
        "in_features": shape[1],
        "out_features": shape[0],
        "vector_lens": [-1, fmt.size],
        "num_centroids": [-1, fmt.entries],
        "num_res_centroids": [-1, fmt.rest or -1],
        "group_num": 1,
        "group_size": shape[1],
        "outlier_size": 0,
        "enable_norm": fmt.column_scale,
        "enable_perm": False,
        "indices_as_float": False,
        "is_indice_packed": True,
    }


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)


def _entry(path: str, layer: Any, shape: Shape) -> Entry:
    where = f"{WHERE} of {path}"
    if not isinstance(layer, dict):
        raise InputError(f"{where} is {layer!r} (allowed: an object)")
    fixed = {"in_features": shape[1], "out_features": shape[0], "group_num": 1, "outlier_size": 0}
    fixed |= {"enable_perm": False, "is_indice_packed": True}
    for key, value in fixed.items():
        setting(layer, key, lambda v, value=value: v == value, repr(value), where)

    def last(key: str) -> int:
        return setting(layer, key, _is_pair, "a pair of whole numbers", where)[1]

    V, K, R = last("vector_lens"), last("num_centroids"), max(last("num_res_centroids"), 0)
    norm = setting(layer, "enable_norm", lambda v: isinstance(v, bool), "true or false", where)
    name = ":".join(["vptq", f"v{V}", f"k{K}", *[f"r{R}"] * (R > 0), *["s"] * norm])
    try:
        fmt = get(name)
        fmt.check(shape)
    except FormatError as e:
        raise InputError(f"{where}: {e}") from e
    O, I = shape
    tensors = {
        "centroids.weight": ((1, K * V), "float16"),
        "indices": ((1, O // V, -(-I * fmt.bits // 32)), "int32"),
    }
    if R:
        tensors["res_centroids.weight"] = ((1, R * V), "float16")
    if norm:
        tensors |= {"weight_scale": ((I,), "float16"), "weight_bias": ((I,), "float16")}
    return Entry(fmt, tensors, partial(_load, fmt, (O, I)))


def _load(fmt: Vector, shape: Shape, arrays: Arrays) -> QTensor:
    if fmt.column_scale and arrays["weight_bias"].any():
        raise FormatError("weight_bias is not 0 (allowed: 0, as a decoder must not add after it multiplies)")
    stream = arrays["indices"][0].astype("<i4").view(np.uint8)
    if stream[:, (used := packed_size(shape[1], fmt.bits)) :].any():
        raise FormatError(f"indices have bits beyond the {shape[1]} codes of a row (allowed: 0)")
    own = {"codes": stream[:, :used], "codebook": arrays["centroids.weight"].reshape(1, 1, fmt.entries, fmt.size)}
    if fmt.rest:
        own["residual"] = arrays["res_centroids.weight"].reshape(1, 1, fmt.rest, fmt.size)
    if fmt.column_scale:
        own["scale"] = arrays["weight_scale"][None]
    return QTensor({k: jnp.asarray(a) for k, a in own.items()}, fmt, (shape[0], shape[1]))

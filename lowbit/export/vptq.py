"""A folder in VPTQ's layout (`quant_method` "vptq"), from weights in `vptq:vV:kK[:rR][:s]`.

Of each weight `PATH`, with one group: `PATH.centroids.weight` fp16 `[1, K V]`; `PATH.indices` int32
`[1, O / V, ceil(I (b + r) / 32)]`, along each row a stream of words `residual << b | index` of b + r bits, least
significant bit first; with a residual `PATH.res_centroids.weight` fp16 `[1, R V]`; with column scales a `weight_scale`
`[I]` and a `weight_bias` of zeros. Its own reader masks a residual with the index's bits, so a residual of more
vectors than the codebook is refused. Outlier columns have another layout there, and are refused too.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import InputError
from lowbit.export.aqlm import quantized, quantized_folder
from lowbit.formats.base import QTensor, unpacked
from lowbit.models.model import Model
from lowbit.vq.vector import Vector


def vptq_tensors(q: QTensor) -> dict[str, np.ndarray]:
    """The arrays of one weight. Raises `InputError` for a format that this layout does not hold."""
    fmt = q.format
    if not isinstance(fmt, Vector) or fmt.columns or fmt.rows or fmt.outliers:
        raise InputError(f"weight in format {fmt.name!r} (allowed: vptq:vV:kK[:rR][:s])")
    if fmt.rest > fmt.entries:
        raise InputError(f"format {fmt.name!r}: VPTQ's reader loses bits (allowed: a residual of at most K vectors)")
    _, stored = unpacked(q)
    packed = np.asarray(q.arrays["codes"])  # the same stream, to whole bytes
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view("<i4")
    out = {"centroids.weight": np.asarray(stored["codebook"], np.float16).reshape(1, -1), "indices": words[None]}
    if fmt.rest:
        out["res_centroids.weight"] = np.asarray(stored["residual"], np.float16).reshape(1, -1)
    if fmt.column_scale:
        out["weight_scale"] = np.asarray(stored["scale"], np.float16)[0]
        out["weight_bias"] = np.zeros(q.shape[1], np.float16)
    return out


def layer_config(q: QTensor) -> dict[str, Any]:
    """A layer's entry in `config_for_layers`; of pairs the first is for outlier columns, which there are none of."""
    fmt = q.format
    return {
        "in_features": q.shape[1],
        "out_features": q.shape[0],
        "vector_lens": [-1, fmt.size],
        "num_centroids": [-1, fmt.entries],
        "num_res_centroids": [-1, fmt.rest or -1],
        "group_num": 1,
        "group_size": q.shape[1],
        "outlier_size": 0,
        "enable_norm": fmt.column_scale,
        "enable_perm": False,
        "indices_as_float": False,
        "is_indice_packed": True,
    }


def export_vptq(model: Model, folder: str | Path) -> None:
    """Writes the model. Raises `InputError` where no weight is packed, and as `vptq_tensors` and
    `lowbit.export.aqlm.quantized_folder` do."""
    found = quantized(model)
    if not found:
        raise InputError("a model without packed weights (allowed: weights in vptq:vV:kK[:rR][:s])")
    arrays = {path: vptq_tensors(q) for path, q in found}  # refuses before anything is written
    layers = {path: layer_config(q) for path, q in found if path in arrays}
    quantized_folder(model, folder, {"quant_method": "vptq", "config_for_layers": layers}, vptq_tensors)

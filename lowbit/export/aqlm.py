"""A folder as AQLM's own library and `transformers` read it (`quant_method` "aqlm"), from weights in `aqlm:MxB:gG`.

Of each weight `PATH`: `PATH.codes` `[O, I / G, M]`, int8 (B up to 8) or int16, unsigned codes wrapped to signed;
`PATH.codebooks` fp16 `[M, 2^B, 1, G]`; `PATH.scales` fp16 `[O, 1, 1, 1]`. They are what is stored here, not rounded
again. The configuration has one kind of codebook for all layers, and names the linears that keep their weight.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import QTensor, unpacked
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import CacheSite
from lowbit.models.config import to_hf
from lowbit.models.hf import tensor_name, write_tokenizer
from lowbit.models.model import Model
from lowbit.models.shards import ShardWriter, atomic_folder
from lowbit.vq.additive import Additive

SHARD = 1 << 62
Tensors = Callable[[QTensor], dict[str, np.ndarray]]


def aqlm_tensors(q: QTensor) -> dict[str, np.ndarray]:
    """The three arrays of one weight. Raises `InputError` for a weight in another format."""
    fmt = q.format
    if not isinstance(fmt, Additive):
        raise InputError(f"weight in format {fmt.name!r} (allowed: aqlm:MxB:gG)")
    codes, stored = unpacked(q)
    kind = np.uint8 if fmt.bits <= 8 else np.uint16
    signed = np.asarray(codes).astype(kind).view(np.int8 if fmt.bits <= 8 else np.int16)
    books = np.asarray(stored["codebook"], np.float16)  # [M, 1, K, G]
    return {
        "codes": signed.reshape(q.shape[0], q.shape[1] // fmt.size, fmt.number),
        "codebooks": np.ascontiguousarray(books.transpose(0, 2, 1, 3)),
        "scales": np.asarray(stored["scale"], np.float16).reshape(-1, 1, 1, 1),
    }


def export_aqlm(model: Model, folder: str | Path) -> None:
    """Writes the model. Raises `InputError` where no weight is in `aqlm:MxB:gG`, where two are in different ones, and
    as `quantized_folder` does."""
    found = {q.format.name: q.format for _, q in quantized(model) if isinstance(q.format, Additive)}
    if len(found) != 1:
        raise InputError(f"weights in {sorted(found) or 'no aqlm format'} (allowed: one of aqlm:MxB:gG for all)")
    (fmt,) = found.values()
    kept = [p for p, leaf in trees.items(model.params) if getattr(leaf, "ndim", 0) == 2 and p != "model.embed_tokens"]
    config = {
        "quant_method": "aqlm",
        "nbits_per_codebook": fmt.bits,
        "num_codebooks": fmt.number,
        "out_group_size": 1,
        "in_group_size": fmt.size,
        "linear_weights_not_to_quantize": [tensor_name(p) for p in kept],
    }
    quantized_folder(model, folder, config, aqlm_tensors)


def quantized(model: Model) -> list[tuple[str, QTensor]]:
    """The packed weights. Raises `InputError` for inputs or caches that these runtimes cannot prepare."""
    for path, leaf in trees.items(model.params):
        if isinstance(leaf, PreparedInput) or (isinstance(leaf, CacheSite) and leaf.op is not None):
            raise InputError(f"{path} prepares its input (allowed: inputs as they are)")
    return [(path, leaf) for path, leaf in trees.items(model.params) if isinstance(leaf, QTensor)]


def quantized_folder(model: Model, folder: str | Path, config: dict[str, Any], tensors: Tensors) -> None:
    """A folder of the model in fp16 with the arrays that `tensors` makes of its packed weights, `config` as its
    `quantization_config`, and the tokenizer; whole or not at all. Raises `InputError` for a leaf that is no array and
    no packed weight, for values beyond fp16, and when a file cannot be written."""
    out = to_hf(model.config, "float16")
    with atomic_folder(folder) as tmp:
        shards = ShardWriter(tmp, SHARD)
        for path, leaf in trees.items(model.params):
            if isinstance(leaf, CacheSite):
                continue
            if isinstance(leaf, QTensor):
                for name, a in tensors(leaf).items():
                    shards.add(f"{path}.{name}", a)
                continue
            if not hasattr(leaf, "dtype"):
                raise InputError(f"{path} is a {type(leaf).__name__} (allowed: arrays and packed weights)")
            with np.errstate(over="ignore"):
                a = np.asarray(leaf, np.float32).astype(np.float16)
            if not np.isfinite(a).all():
                raise InputError(f"{path} holds values that fp16 cannot (allowed: magnitudes up to 65504)")
            shards.add(tensor_name(path), a)
        shards.close()
        text = json.dumps(out | {"quantization_config": config}, indent=2) + "\n"
        (tmp / "config.json").write_text(text, encoding="utf-8")
        write_tokenizer(model.source, model.tokenizer, tmp)

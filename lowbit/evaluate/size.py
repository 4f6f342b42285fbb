"""How large a model is: true bits per weight and stored bytes, counted on the packed arrays."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter, described_shapes, restore
from lowbit.formats.base import Coded, Format, Latent, QTensor, stored_bytes
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg.online import describe
from lowbit.models import cache as caches
from lowbit.models import hf
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A parameter as it would be written."""

    format: str
    packed: bool
    weights: int
    shape: tuple[int, ...]
    arrays: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return sum(stored_bytes(a) for a in self.arrays)


def _stored(leaf: Any) -> _Stored:
    """A weight in training counts as the codes that it stands for; a cache site as the arrays of its transform. The
    factors of an adapter are bytes of the weight that they adapt, not further weights."""
    if isinstance(leaf, CacheSite):
        return _Stored(leaf.name, False, 0, (), tuple(caches.describe(leaf)[1].values()))
    if isinstance(leaf, PreparedInput):
        inner = _stored(leaf.w)
        return dataclasses.replace(inner, arrays=(*inner.arrays, *describe(leaf)[1].values()))
    if isinstance(leaf, Adapter):
        inner = _stored(leaf.w)
        name = f"{inner.format}+lora:r{leaf.b.shape[-1]}"
        return dataclasses.replace(inner, format=name, arrays=(*inner.arrays, leaf.a, leaf.b))
    if isinstance(leaf, Latent | Coded):
        return _stored(jax.eval_shape(lambda weight: weight.encode(), leaf))
    if isinstance(leaf, QTensor):
        return _Stored(leaf.format.name, True, math.prod(leaf.shape), leaf.shape, tuple(leaf.arrays.values()))
    return _Stored(str(leaf.dtype), False, math.prod(leaf.shape), tuple(leaf.shape), (leaf,))


def sizes(params: Mapping[str, Any], config: ModelConfig | None = None) -> dict[str, Any]:
    """Sizes of a parameter tree.

    `params`: number of parameters, tied ones once. `stored_bytes`: bytes of all arrays, scales and codebooks included,
    an array that several tensors share once. `bits_per_weight`: 8 stored bytes / parameters.
    `bits_per_weight_quantized`: the same over packed tensors only, None if there is none. With `config`, raises
    `InputError` when the tree does not have the parameters that it describes.
    """
    seen: dict[int, Any] = {}  # holds the arrays, so that an id stays theirs
    total = {True: [0, 0], False: [0, 0]}  # packed or not: weights, bytes
    for _, leaf in trees.items(params):
        stored = _stored(leaf)
        fresh = [a for a in stored.arrays if id(a) not in seen]
        seen |= {id(a): a for a in fresh}
        if not fresh:
            continue  # the same matrix under a second name
        total[stored.packed][0] += stored.weights
        total[stored.packed][1] += sum(stored_bytes(a) for a in fresh)
    weights, nbytes = (total[True][k] + total[False][k] for k in (0, 1))
    if not weights:
        raise InputError("model has 0 parameters (allowed: at least 1)")
    if config is not None:
        expected = sum(math.prod(s) for s in config.shapes().values())
        if weights != expected:
            raise InputError(f"model has {weights} parameters (allowed: {expected}, as its configuration says)")
    return {
        "params": weights,
        "stored_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights,
        "bits_per_weight_quantized": 8 * total[True][1] / total[True][0] if total[True][0] else None,
    }


def folder_sizes(folder: str | Path) -> dict[str, Any]:
    """`sizes` of a Hugging Face folder, plain or packed, from the headers of its files: no weight is read. Raises
    `InputError` unless these have the tensors that its config.json describes."""
    hf.readers(folder)
    config = hf.load_config(folder)
    kinds, shapes, leaves = hf.stored_kinds(folder), config.shapes(), {}
    for path, kind in kinds.items():
        w = jax.ShapeDtypeStruct(shapes[path], "float32" if isinstance(kind, Format) else kind)
        leaves[path] = jax.eval_shape(kind.encode, w) if isinstance(kind, Format) else w
    for path, names in hf.stored_adapters(folder).items():
        factors = described_shapes(path, names, shapes[path])
        leaves[path] = restore(leaves[path], names, {k: jax.ShapeDtypeStruct(s, "float32") for k, s in factors.items()})
    return sizes(trees.build(leaves), config)


def layer_table(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per parameter: `path`, `format` (a format's name or the dtype), `shape`, `bits` per weight, `bytes`; and
    one per cache site, which has no shape."""
    rows = []
    for path, leaf in trees.items(params):
        s = _stored(leaf)
        bits = 8 * s.nbytes / s.weights if s.weights else 0.0
        rows.append({"path": path, "format": s.format, "shape": s.shape, "bits": bits, "bytes": s.nbytes})
    return rows


def file_bytes(source: str | Path) -> int | None:
    """Bytes on disk of a model: its file, or the weight files of its folder; None if `source` is no local path."""
    path = Path(source) if source else None
    if path is None or not path.exists():
        return None
    if path.is_file():
        return path.stat().st_size
    files = [p for suffix in ("*.safetensors", "*.gguf", "*.bin") for p in sorted(path.glob(suffix))]
    return sum(p.stat().st_size for p in files) or None

"""How large a model is: true bits per weight and stored bytes, counted on the packed arrays."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Latent, QTensor, stored_bytes
from lowbit.formats.fake_quant import QuantizedInput
from lowbit.models.config import ModelConfig


def _stored(leaf: Any) -> Any:
    """The leaf as it would be written: a latent weight counts as the codes that it stands for."""
    if isinstance(leaf, QuantizedInput):
        return _stored(leaf.w)
    if isinstance(leaf, Latent):
        return jax.eval_shape(lambda latent: latent.encode(), leaf)
    return leaf


def _arrays(leaf: Any) -> Iterator[Any]:
    yield from leaf.arrays.values() if isinstance(leaf, QTensor) else (leaf,)


def _weights(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def sizes(params: Mapping[str, Any], config: ModelConfig | None = None) -> dict[str, Any]:
    """Sizes of a parameter tree.

    `params`: number of parameters, tied ones once. `stored_bytes`: bytes of all arrays, scales and codebooks included,
    an array that several tensors share once. `bits_per_weight`: 8 stored bytes / parameters.
    `bits_per_weight_quantized`: the same over packed tensors only, None if there is none. With `config`, raises
    `InputError` when the tree does not have the parameters that it describes.
    """
    seen: set[int] = set()
    total = {True: [0, 0], False: [0, 0]}  # quantized or not: weights, bytes
    alive = []  # keeps ids unique while they are compared
    for _, leaf in trees.items(params):
        leaf = _stored(leaf)
        packed = isinstance(leaf, QTensor)
        fresh = [a for a in _arrays(leaf) if id(a) not in seen]
        alive += fresh
        seen |= {id(a) for a in fresh}
        if not packed and not fresh:
            continue  # the same matrix under a second name
        total[packed][0] += _weights(leaf)
        total[packed][1] += sum(stored_bytes(a) for a in fresh)
    weights, nbytes = (total[True][k] + total[False][k] for k in (0, 1))
    if not weights:
        raise InputError("model has 0 parameters (allowed: at least 1)")
    if config is not None:
        expected = sum(int(np.prod(s)) for s in config.shapes().values())
        if weights != expected:
            raise InputError(f"model has {weights} parameters (allowed: {expected}, as its configuration says)")
    return {
        "params": weights,
        "stored_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights,
        "bits_per_weight_quantized": 8 * total[True][1] / total[True][0] if total[True][0] else None,
    }


def layer_table(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per parameter: `path`, `format` (a format's name or the dtype), `shape`, `bits` per weight, `bytes`."""
    rows = []
    for path, leaf in trees.items(params):
        leaf = _stored(leaf)
        packed = isinstance(leaf, QTensor)
        nbytes = sum(stored_bytes(a) for a in _arrays(leaf))
        rows.append(
            {
                "path": path,
                "format": leaf.format.name if packed else str(leaf.dtype),
                "shape": tuple(leaf.shape),
                "bits": 8 * nbytes / _weights(leaf),
                "bytes": nbytes,
            }
        )
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

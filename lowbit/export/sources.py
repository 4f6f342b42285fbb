"""What an export reads: the parameters of a model in memory, or of a Hugging Face folder one at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Format, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.floats import FloatFormat
from lowbit.models import hf
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.tree import items

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f32": "float32"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One parameter before it is written: what is known without its values, and how to get them.

    `format` is None for a float tensor of `dtype`; `load` gives the array or the `QTensor`, from a folder anew at each
    call, and keeps nothing.
    """

    shape: tuple[int, ...]
    dtype: str
    format: Format | None
    load: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Sources:
    """A model as its parameters: `tensors` by path, in the model's order. `place` is where it came from, or empty."""

    config: ModelConfig
    tokenizer: Any
    place: str
    tensors: dict[str, Source]


def open_sources(source: Model | str | Path, drop_activations: bool = False, online: bool = False) -> Sources:
    """The sources of a model or of a folder (plain or packed), of which only headers are read here.

    `drop_activations` gives the weights of layers that also quantize their input; without it these raise `InputError`,
    from a folder when they are loaded, and so do cache formats, at once. `online` does the same for layers that
    transform their input or have an adapter. Raises `InputError` like `load_hf`, but for values.
    """
    if isinstance(source, Model):
        tensors = {}
        for p, leaf in items(source.params):
            if isinstance(leaf, CacheSite):
                _check_cache(p, leaf, drop_activations)
            else:
                tensors[p] = _of_leaf(unwrap(p, leaf, drop_activations, online))
        return Sources(source.config, source.tokenizer, source.source, tensors)
    folder = Path(source)
    config, kinds, tensors = hf.load_config(folder), hf.stored_kinds(folder), {}
    shapes = config.shapes()

    def load(path: str, read: Callable[[], Any]) -> Any:
        return unwrap(path, read(), drop_activations, online)

    for path, read in hf.readers(folder).items():
        if path not in kinds:
            _check_cache(path, read(), drop_activations)
            continue
        kind = kinds[path]
        fmt = kind if isinstance(kind, Format) and not isinstance(kind, FloatFormat) else None
        dtype = _DTYPES[kind.name] if isinstance(kind, FloatFormat) else str(kind)
        tensors[path] = Source(shapes[path], dtype, fmt, partial(load, path, read))
    return Sources(config, hf.load_tokenizer(folder), str(folder), tensors)


def leaves(source: Model | str | Path) -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` as stored, activation formats included; from a folder one at a time."""
    return items(source.params) if isinstance(source, Model) else hf.iter_tensors(source)


def unwrap(path: str, leaf: Any, drop_activations: bool = False, online: bool = False) -> Any:
    """The array or `QTensor` of a leaf; a weight in training gives its codes and scales. Raises `InputError` for an
    adapter and for what is done to its input, unless that may be left out."""
    if isinstance(leaf, PreparedInput):
        if leaf.op is not None and not online:
            raise InputError(
                f"{path} transforms its input online ({leaf.op.name}), which the target cannot run and without which "
                "the model is another one (allowed: packed, or a transform that folds into the weights)"
            )
        if leaf.act is not None and not drop_activations:
            raise InputError(
                f"{path} quantizes its input ({leaf.act.name}), which the file cannot hold "
                "(allowed: weight formats only, or drop_activations)"
            )
        leaf = leaf.w
    if isinstance(leaf, Adapter):
        if not online:
            raise InputError(
                f"{path} has an adapter, which the target cannot hold beside the weight (allowed: packed, or a merged "
                "model: lowbit merge)"
            )
        leaf = leaf.w
    if isinstance(leaf, Latent | Coded):
        leaf = leaf.encode()
    return leaf.arrays["w"] if isinstance(leaf, QTensor) and isinstance(leaf.format, FloatFormat) else leaf


def _check_cache(path: str, site: CacheSite, drop_activations: bool) -> None:
    """A cache's transform alone may go: it cancels."""
    if site.format is not None and not drop_activations:
        raise InputError(
            f"{path} has the cache format {site.format.name}, which the file cannot hold: how the cache is kept is the "
            "other runtime's choice (allowed: none, or drop_activations)"
        )


def _of_leaf(leaf: Any) -> Source:
    if isinstance(leaf, QTensor):
        return Source(leaf.shape, leaf.dtype, leaf.format, lambda: leaf)
    return Source(tuple(leaf.shape), str(leaf.dtype), None, lambda: leaf)

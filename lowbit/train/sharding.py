"""A data x fsdp x tensor mesh: which axis of which parameter lies on which devices.

Linears that widen (q, k, v, gate, up) put their outputs on `tensor`, those that narrow again (o, down) their inputs,
so that a block communicates once after attention and once after the MLP; embeddings put the vocabulary there. The
other axis of each is spread over `fsdp`. Batches are split over `data` and `fsdp`. An axis that does not divide is kept
whole, and that is reported.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lowbit.errors import InputError
from lowbit.formats.adapter import ARRAYS

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
RULES: tuple[tuple[str, tuple[str, str]], ...] = (
    (r".*\.(q|k|v|gate|up)_proj", ("tensor", "fsdp")),
    (r".*\.(o|down)_proj", ("fsdp", "tensor")),
    (r"(.*\.)?(embed_tokens|lm_head)", ("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Sharding of every named parameter; `whole` says which axes could not be split, and why."""

    mesh: Mesh | AbstractMesh
    specs: dict[str, PartitionSpec]
    whole: tuple[str, ...]

    def of(self, name: str) -> NamedSharding:
        """Of the parameter with this name; other names are replicated."""
        return NamedSharding(self.mesh, self.specs.get(name, PartitionSpec()))


def make_mesh(shape: tuple[int, int, int]) -> Mesh:
    """The mesh over all devices; one -1 takes what is left. Raises `InputError` when the devices do not fit."""
    have = jax.device_count()
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and have % known:
        raise InputError(f"mesh {shape} does not divide {have} devices (allowed: products that divide {have})")
    sizes = tuple(have // known if n == -1 else n for n in shape)
    if math.prod(sizes) != have:
        raise InputError(f"mesh {sizes} needs {math.prod(sizes)} devices (there are {have})")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def shard(params: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> Sharding:
    """Partition of named parameters (arrays or `ShapeDtypeStruct`s); see the module's docstring for the rules."""
    specs, whole = {}, []
    for name, a in params.items():
        path, _, part = name.partition(":")
        axes: Any = next((axes for rule, axes in RULES if re.fullmatch(rule, path)), None)
        if axes is not None and part in ARRAYS:  # the rank of an adapter stays whole
            axes = (None, axes[1]) if part == ARRAYS[0] else (axes[0], None)
        if axes is None or a.ndim != 2:
            specs[name] = PartitionSpec()
            continue
        spec: list[str | None] = []
        for axis, size in zip(axes, a.shape, strict=True):
            n = 1 if axis is None else mesh.shape[axis]
            if size % n and size > 1:
                whole.append(f"{name}: {size} does not divide over {n} {axis} devices")
            spec.append(axis if size % n == 0 and n > 1 else None)
        specs[name] = PartitionSpec(*spec)
    return Sharding(mesh, specs, tuple(whole))


def place(params: Mapping[str, Array], sharding: Sharding) -> dict[str, Array]:
    """Named parameters on their devices."""
    return {name: jax.device_put(a, sharding.of(name)) for name, a in params.items()}


def like(tree: Any, sharding: Sharding) -> Any:
    """Shardings for an optimizer state: its dicts are keyed by parameter names, anything else is replicated."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), "")
        spec = sharding.specs.get(name, PartitionSpec())
        return NamedSharding(sharding.mesh, spec if len(spec) <= leaf.ndim else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def check_batch(size: int, microbatches: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises `InputError` unless each microbatch splits evenly over the devices that share it."""
    n = math.prod(mesh.shape[a] for a in BATCH)
    if (size // microbatches) % n:
        raise InputError(
            f"batch_size {size} in {microbatches} microbatches over {n} data x fsdp devices "
            f"(allowed: multiples of {microbatches * n})"
        )


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """Arrays `[B, ...]` split over `data` and `fsdp`. Every process gives the same whole batch and keeps its rows."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    out = {}
    for name, a in batch.items():
        a = np.asarray(a)
        out[name] = jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
    return out

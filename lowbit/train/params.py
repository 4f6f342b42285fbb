"""Parameters as the trainer sees them: one flat dict of arrays under names, and a JSON description of the rest.

A weight keeps its path as its name whether it is a plain array or the latent of a quantized layer, so optimizer
groups, sharding rules and checkpoints need not know which. What a format adds gets a suffix: a learned scale of
`model.layers.0.mlp.up_proj` is `model.layers.0.mlp.up_proj:scale`, packed codes are `...:codes`, the factors of an
adapter `...:lora_a` and `...:lora_b`.
"""

from collections.abc import Mapping
from typing import Any

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.formats import adapter, base
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg import online
from lowbit.models import cache as caches
from lowbit.models.cache import CacheSite
from lowbit.tree import Tree

Flat = dict[str, Any]  # arrays, or `ShapeDtypeStruct`s where nothing is computed yet
Layout = dict[str, dict[str, Any]]  # path -> {"kind": "array" | "latent" | "packed" | "cache", ...}, JSON-able


def flatten(params: Mapping[str, Any]) -> tuple[Flat, Layout]:
    """Arrays by name, and what `unflatten` needs to put them back."""
    flat: Flat = {}
    layout: Layout = {}
    for path, leaf in trees.items(params):
        entry: dict[str, Any] = {}
        if isinstance(leaf, CacheSite):
            names, arrays = caches.describe(leaf)
            layout[path] = {"kind": "cache", **names, "prepared": sorted(arrays)}
            flat |= {f"{path}:{k}": arrays[k] for k in sorted(arrays)}
            continue
        if isinstance(leaf, PreparedInput):
            names, arrays = online.describe(leaf)
            entry |= names | {"prepared": sorted(arrays)}
            flat |= {f"{path}:{k}": arrays[k] for k in sorted(arrays)}
            leaf = leaf.w
        if isinstance(leaf, Adapter):
            entry["adapter"], arrays = adapter.describe(leaf)
            flat |= {f"{path}:{k}": a for k, a in arrays.items()}
            leaf = leaf.w
        if isinstance(leaf, Latent):
            entry |= {"kind": "latent", "format": leaf.format.name, "arrays": sorted(leaf.params)}
            flat[path] = leaf.w
            flat |= {f"{path}:{k}": leaf.params[k] for k in sorted(leaf.params)}
        elif isinstance(leaf, QTensor):
            entry |= {"kind": "packed", "format": leaf.format.name, "arrays": sorted(leaf.arrays)}
            entry |= {"shape": list(leaf.shape), "dtype": leaf.dtype}
            flat |= {f"{path}:{k}": leaf.arrays[k] for k in sorted(leaf.arrays)}
        else:
            entry["kind"] = "array"
            flat[path] = leaf
        layout[path] = entry
    return flat, layout


def unflatten(flat: Mapping[str, Any], layout: Layout) -> Tree:
    """Inverse of `flatten`. Raises `InputError` on a missing array, an unknown kind or an unknown format."""
    out: dict[str, Any] = {}
    for path, entry in layout.items():
        try:
            match entry["kind"]:
                case "array":
                    leaf: Any = flat[path]
                case "latent":
                    extra = {k: flat[f"{path}:{k}"] for k in entry["arrays"]}
                    leaf = Latent(flat[path], extra, base.get(entry["format"]))
                case "packed":
                    arrays = {k: flat[f"{path}:{k}"] for k in entry["arrays"]}
                    leaf = QTensor(arrays, base.get(entry["format"]), tuple(entry["shape"]), entry["dtype"])
                case "cache":
                    arrays = {k: flat[f"{path}:{k}"] for k in entry["prepared"]}
                    out[path] = caches.restore({k: entry[k] for k in ("format", "online") if k in entry}, arrays)
                    continue
                case kind:
                    raise unknown(f"kind of {path}", kind, ["array", "latent", "packed", "cache"])
            factors = {k: flat[f"{path}:{k}"] for k in adapter.ARRAYS if "adapter" in entry}
            own = {k: flat[f"{path}:{k}"] for k in entry.get("prepared", ())}
        except KeyError as e:
            raise InputError(f"parameters have no {e.args[0]!r} (needed for {path})") from e
        leaf = adapter.restore(leaf, entry.get("adapter"), factors)
        out[path] = online.restore(leaf, {k: entry[k] for k in ("input", "online") if k in entry}, own)
    return trees.build(out)


def trainable(layout: Layout) -> set[str]:
    """Names that an optimizer may change: everything but the arrays of packed weights, of activation formats, of caches
    and of online transforms. In a tree with adapters, their factors and nothing else."""
    names = {f"{path}:{k}" for path, entry in layout.items() if "adapter" in entry for k in adapter.ARRAYS}
    if names:
        return names
    for path, entry in layout.items():
        if entry["kind"] in ("packed", "cache"):
            continue
        names.add(path)
        names |= {f"{path}:{k}" for k in entry.get("arrays", ())}
    return names

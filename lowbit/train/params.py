"""Parameters as the trainer sees them: one flat dict of arrays under names, and a JSON description of the rest.

A weight keeps its path as its name whether it is a plain array or the latent of a quantized layer, so optimizer
groups, sharding rules and checkpoints need not know which. What a format adds gets a suffix: a learned scale of
`model.layers.0.mlp.up_proj` is `model.layers.0.mlp.up_proj:scale`, packed codes are `...:codes`, the factors of an
adapter `...:lora_a` and `...:lora_b`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.formats import adapter, base
from lowbit.formats.activation import get_act
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg import online
from lowbit.models import cache as caches
from lowbit.models.cache import CacheSite
from lowbit.tree import Tree

Flat = dict[str, Any]  # arrays, or `ShapeDtypeStruct`s where nothing is computed yet
Layout = dict[
    str, dict[str, Any]
]  # path -> {"kind": "array" | "latent" | "coded" | "packed" | "cache", ...}, JSON-able


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
            entry |= {"soft": True} if leaf.soft else {}
            flat[path] = leaf.w
            flat |= {f"{path}:{k}": leaf.params[k] for k in sorted(leaf.params)}
        elif isinstance(leaf, QTensor | Coded):
            entry |= {"kind": "packed", "format": leaf.format.name, "arrays": sorted(leaf.arrays)}
            entry |= {"shape": list(leaf.shape), "dtype": leaf.dtype}
            flat |= {f"{path}:{k}": leaf.arrays[k] for k in sorted(leaf.arrays)}
            if isinstance(leaf, Coded):
                entry |= {"kind": "coded", "learned": sorted(leaf.params)}
                flat |= {f"{path}:{k}": leaf.params[k] for k in sorted(leaf.params)}
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
                    leaf = Latent(flat[path], extra, base.get(entry["format"]), soft=entry.get("soft", False))
                case "packed" | "coded" as kind:
                    arrays = {k: flat[f"{path}:{k}"] for k in entry["arrays"]}
                    static = base.get(entry["format"]), tuple(entry["shape"]), entry["dtype"]
                    if kind == "packed":
                        leaf = QTensor(arrays, *static)
                    else:
                        leaf = Coded(arrays, {k: flat[f"{path}:{k}"] for k in entry["learned"]}, *static)
                case "cache":
                    arrays = {k: flat[f"{path}:{k}"] for k in entry["prepared"]}
                    out[path] = caches.restore({k: entry[k] for k in ("format", "online") if k in entry}, arrays)
                    continue
                case kind:
                    raise unknown(f"kind of {path}", kind, ["array", "latent", "coded", "packed", "cache"])
            factors = {k: flat[f"{path}:{k}"] for k in adapter.ARRAYS if "adapter" in entry}
            own = {k: flat[f"{path}:{k}"] for k in entry.get("prepared", ())}
        except KeyError as e:
            raise InputError(f"parameters have no {e.args[0]!r} (needed for {path})") from e
        leaf = adapter.restore(leaf, entry.get("adapter"), factors)
        out[path] = online.restore(leaf, {k: entry[k] for k in ("input", "online") if k in entry}, own)
    return trees.build(out)


def mixed(params: Tree, mix: Any) -> Tree:
    """The tree whose latents and quantized inputs are only `mix`, a scalar, of the way to their grids."""

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput):
            return dataclasses.replace(leaf, w=one(path, leaf.w), mix=None if leaf.act is None else mix)
        return dataclasses.replace(leaf, mix=mix) if isinstance(leaf, Latent) else leaf

    return trees.map_leaves(one, params)


def trainable(layout: Layout) -> set[str]:
    """Names that an optimizer may change: everything but codes, the arrays of packed weights, of activation formats
    (unless those learn them), of caches and of online transforms. In a tree with adapters, their factors
    and those of inputs alone."""
    names: set[str] = set()
    for path, entry in layout.items():
        if "input" in entry and getattr(get_act(entry["input"]), "learned", False):
            names |= {f"{path}:{k}" for k in entry["prepared"] if k.startswith("input.")}
    if factors := {f"{path}:{k}" for path, entry in layout.items() if "adapter" in entry for k in adapter.ARRAYS}:
        return names | factors
    for path, entry in layout.items():
        if entry["kind"] in ("packed", "cache"):
            continue
        if entry["kind"] == "coded":
            names |= {f"{path}:{k}" for k in entry["learned"]}
            continue
        names.add(path)
        names |= {f"{path}:{k}" for k in entry.get("arrays", ())}
    return names

"""Parameter trees: nested dicts keyed by the Hugging Face tensor names without their `.weight` suffix.

`model.layers.0.self_attn.q_proj.weight` is `tree["model"]["layers"]["0"]["self_attn"]["q_proj"]`. A bias is a sibling
leaf whose key keeps its dot, `["self_attn"]["q_proj.bias"]`, so that joining the keys gives the HF name back.
Leaves are arrays, `QTensor`s, weights in training (`Latent`, `Coded`) or `Adapter`s, any of them inside of a
`PreparedInput`, and `CacheSite`s.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tree = dict[str, Any]


def items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(path, leaf)` in insertion order; only dicts are descended into."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from items(value, path)
        else:
            yield path, value


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at a dotted path; raises `KeyError(path)`."""
    node: Any = tree
    parts = path.split(".")
    for i, key in enumerate(parts):
        if not isinstance(node, Mapping):
            raise KeyError(path)
        if ".".join(parts[i:]) in node:  # before its first part: a bias "q_proj.bias" lies beside the weight "q_proj"
            return node[".".join(parts[i:])]
        if key in node:
            node = node[key]
        else:
            raise KeyError(path)
    return node


def build(flat: Mapping[str, Any]) -> Tree:
    """The nested dict of `{path: leaf}`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        stem, bias = (path[: -len(".bias")], True) if path.endswith(".bias") else (path, False)
        *parents, last = stem.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last + ".bias" if bias else last] = leaf
    return tree


def map_leaves(f: Callable[[str, Any], Any], tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """`f(path, leaf)` at every leaf, same structure."""
    out: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        out[key] = map_leaves(f, value, path) if isinstance(value, Mapping) else f(path, value)
    return out

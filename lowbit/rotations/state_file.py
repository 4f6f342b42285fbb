"""A transform's state as one safetensors file: learned once, applied again.

Tensors in float64: `residual`, `heads.LAYER`, `smooth.PATH`, and the arrays of online transforms, `inputs.PATH.NAME`
and `caches.PATH.NAME`; the metadata has `name`, `norms`, and the names of the transforms by site as JSON.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import files
from lowbit.errors import InputError
from lowbit.linalg import online
from lowbit.models.model import Model
from lowbit.rotations.fold import State

KIND = "lowbit-transform"


def save(state: State, path: str | Path) -> None:
    """Writes the file, whole or not at all. Raises `InputError` when it cannot be written."""
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {f"heads.{i}": r for i, r in state.heads.items()}
    tensors |= {f"smooth.{p}": s for p, s in state.smooth.items()}
    if state.residual is not None:
        tensors["residual"] = state.residual
    names: dict[str, dict[str, str]] = {}
    for kind, ops in (("inputs", state.inputs), ("caches", state.caches)):
        names[kind] = {site: op.name for site, op in ops.items()}
        tensors |= {f"{kind}.{site}.{n}": a for site, op in ops.items() for n, a in op.arrays.items()}
    metadata = {"kind": KIND, "name": state.name, "norms": json.dumps(state.norms)}
    metadata |= {kind: json.dumps(sites) for kind, sites in names.items()}
    wide = {k: np.ascontiguousarray(np.asarray(a, np.float64)) for k, a in tensors.items()}
    with files.atomic_path(path) as tmp:
        save_file(wide, tmp, metadata)


def load(path: str | Path) -> State:
    """The state of a file. Raises `InputError` for a file that is missing, damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot read the transform {path}: {e} (allowed: a file that lowbit transform wrote)") from e
    if metadata.get("kind") != KIND:
        raise InputError(f"{path} is no transform (allowed: a file that lowbit transform wrote)")
    wrong = [k for k, a in tensors.items() if a.dtype != np.float64 or not np.isfinite(a).all()]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is not finite float64 (allowed: a file that lowbit transform wrote)")

    def part(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): a for k, a in tensors.items() if k.startswith(prefix)}

    def ops(kind: str) -> dict[str, Any]:
        return {
            site: online.get(name, {n: a.astype(np.float32) for n, a in part(f"{kind}.{site}.").items()})
            for site, name in json.loads(metadata[kind]).items()
        }

    heads = {int(i): r for i, r in part("heads.").items()}
    norms = json.loads(metadata["norms"])
    residual = tensors.get("residual")
    return State(metadata["name"], norms, residual, heads, part("smooth."), ops("inputs"), ops("caches"))


def check(state: State, model: Model, where: str) -> None:
    """Raises `InputError` unless the state's sizes are those of the model."""
    c = model.config
    shapes = c.shapes()
    if state.residual is not None and state.residual.shape != (c.hidden_size,) * 2:
        have = "x".join(map(str, state.residual.shape))
        raise InputError(f"{where} rotates a residual stream of {have} (the model's hidden size is {c.hidden_size})")
    for i, r in state.heads.items():
        if i >= c.num_layers or r.shape != (c.head_dim,) * 2:
            raise InputError(f"{where} rotates heads of {r.shape[0]} in layer {i} (the model has others)")
    for site in (*state.smooth, *state.inputs):
        if site not in shapes:
            raise InputError(f"{where} transforms {site}, which the model lacks (allowed: a transform made for it)")
    for site, op in state.inputs.items():
        op.check(shapes[site][1])

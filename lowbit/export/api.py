"""`export`: writes a model for a target, then reads the file back with an independent reader and compares.

Targets: `gguf`, `gguf:TYPE` (`gguf:Q4_0`), `hf`, `hf:DTYPE` (dequantized, for `transformers`) and `packed` (our own
codes and scales).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.export.gguf import Overrides, expected, unwrap, write_gguf
from lowbit.export.gguf_read import read_gguf
from lowbit.export.gguf_types import FLOAT_DTYPES, TYPES, get
from lowbit.export.hf import export_hf
from lowbit.formats.base import QTensor
from lowbit.models.hf import load_hf
from lowbit.models.model import Model
from lowbit.tree import map_leaves

TARGETS = ("gguf", "hf", "packed")
KL_LIMIT = 1e-4  # nats per token, where the file holds the same weights
TOKENS = (2, 64)  # of the comparison


class ExportMismatch(InputError):
    """The file that was just written does not hold the model it was written from."""


def targets() -> list[str]:
    """Every target that `export` takes."""
    return ["gguf", *(f"gguf:{t}" for t in TYPES), "hf", *(f"hf:{d}" for d in _DTYPES), "packed"]


_DTYPES = ("float32", "float16", "bfloat16")


def export(
    model: Model,
    to: str,
    out: str | Path,
    *,
    overrides: Overrides = (),
    embedding: str | None = None,
    drop_activations: bool = False,
) -> dict[str, Any]:
    """Writes `model` to the file (gguf) or folder `out`, reloads it and returns a report.

    The report has `to`, `path`, `bytes`, `types` (number of tensors by type), `fresh` (float tensors that were
    quantized here), `rounded` (values that a float cast changed, by path), `notes`, `weights` (how many were compared,
    all equal), `kl_mean` and `kl_max` (of the reloaded file against the model in memory, nats per token) and `seconds`.
    With `fresh` or `rounded` tensors the KL is the cost of that rounding; else it exceeds `KL_LIMIT` only by a fault.

    Raises `InputError` for what the target cannot hold and `ExportMismatch` when the file differs; it is left in place.
    """
    start = time.monotonic()
    kind, _, option = to.partition(":")
    if kind not in TARGETS or (kind == "packed" and option):
        raise unknown("export target", to, targets())
    if kind != "gguf" and (overrides or embedding):
        raise InputError(f"overrides or embedding with target {to!r} (allowed: with gguf)")
    report: dict[str, Any] = {"to": to, "path": str(out), "fresh": [], "rounded": {}, "notes": []}
    if kind == "gguf":
        r = write_gguf(
            model, out, option or "auto", overrides=overrides, embedding=embedding, drop_activations=drop_activations
        )
        report |= {"fresh": r.fresh, "rounded": r.rounded, "notes": r.notes, "types": _count(r.types.values())}
        report["weights"] = _compare_gguf(model, out, r.types, drop_activations)
        again = read_gguf(out)
    else:
        dtype = option or None
        if dtype is not None and dtype not in _DTYPES:
            raise unknown("dtype of export target hf", dtype, _DTYPES)
        if kind == "hf":
            model = model.replace(params=map_leaves(lambda p, x: unwrap(p, x, drop_activations), model.params))
            dtype = dtype or _plain_dtype(model)
        export_hf(model, out, packed=kind == "packed", dtype=dtype)
        again = load_hf(out)
        report["weights"], report["rounded"] = _compare_hf(model, again, dtype, out)
        report["types"] = _count(_kind(x) for _, x in trees.items(again.params))
    report["bytes"] = size(out)
    report["kl_mean"], report["kl_max"] = _divergence(model, again, drop_activations)
    if not np.isfinite(report["kl_mean"]) or (
        report["kl_mean"] > KL_LIMIT and not report["fresh"] and not report["rounded"]
    ):
        raise ExportMismatch(f"{out}: KL {report['kl_mean']:.3g} to the model in memory (allowed: {KL_LIMIT})")
    report["seconds"] = time.monotonic() - start
    return report


def size(path: str | Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


# -- comparison -------------------------------------------------------------------------------------------------------


def _compare_gguf(model: Model, out: str | Path, types: dict[str, str], drop_activations: bool) -> int:
    """Every weight of the file, read by code that shares nothing with the writer (`verify`), against memory."""
    from lowbit.export import verify

    total = 0
    try:
        for path, kind, w in verify.weights(out, types):
            if kind != types[path]:
                raise ExportMismatch(f"{out}: {path} has type {kind} (allowed: {types[path]}, as it was written)")
            leaf = unwrap(path, trees.get(model.params, path), drop_activations)
            _same(path, w, expected(path, leaf, get(kind), model.config), out)
            total += w.size
    except (ValueError, IndexError, KeyError) as e:
        if isinstance(e, InputError):
            raise
        raise ExportMismatch(f"{out}: the gguf library cannot read it: {e} (allowed: a whole GGUF file)") from e
    return total


def _compare_hf(model: Model, again: Model, dtype: str | None, out: str | Path) -> tuple[int, dict[str, int]]:
    total, rounded = 0, {}
    for path, leaf in trees.items(model.params):
        a, b = _float32(path, leaf), _float32(path, trees.get(again.params, path))
        if dtype is not None:
            name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
            cast = a.astype(FLOAT_DTYPES[name]).astype(np.float32)
            if changed := int(np.count_nonzero(cast != a)):
                rounded[path] = changed
            a = cast
        _same(path, b, a, out)
        total += a.size
    return total, rounded


def _same(path: str, found: np.ndarray, wanted: np.ndarray, out: str | Path) -> None:
    if not np.array_equal(found, wanted):
        n = "all" if found.shape != wanted.shape else int(np.count_nonzero(found != wanted))
        raise ExportMismatch(f"{out}: {n} weights of {path} differ from the model in memory (allowed: none)")


def _float32(path: str, leaf: Any) -> np.ndarray:
    leaf = unwrap(path, leaf, True)
    if isinstance(leaf, QTensor):
        leaf = dataclasses.replace(leaf, dtype="float32").decode()
    return np.asarray(leaf).astype(np.float32)


def _divergence(model: Model, again: Model, drop_activations: bool) -> tuple[float, float]:
    """Mean and largest KL over random tokens, both computed in float32 from float32 decodes."""
    rows, length = TOKENS
    length = min(length, model.config.max_position, again.config.max_position)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))

    def plain(path: str, leaf: Any) -> Any:
        leaf = unwrap(path, leaf, True) if drop_activations else leaf
        return dataclasses.replace(leaf, dtype="float32") if isinstance(leaf, QTensor) else leaf

    p, q = (jax.nn.log_softmax(m.replace(params=map_leaves(plain, m.params)).logits(tokens)) for m in (model, again))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return max(float(kl.mean()), 0.0), max(float(kl.max()), 0.0)


def _plain_dtype(model: Model) -> str | None:
    return "float32" if any(isinstance(x, QTensor) for _, x in trees.items(model.params)) else None


def _kind(leaf: Any) -> str:
    leaf = getattr(leaf, "w", leaf)
    return leaf.format.name if isinstance(leaf, QTensor) else str(leaf.dtype)


def _count(names: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for n in names:
        out[n] = out.get(n, 0) + 1
    return out

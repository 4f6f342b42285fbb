"""`export`: writes a model for a target, then reads the file back with an independent reader and compares.

Targets: `gguf`, `gguf:TYPE` (`gguf:Q4_0`), `hf`, `hf:DTYPE` (dequantized, for `transformers`), `packed` (our own
codes and scales), and the layouts of other runtimes for vector formats (`lowbit.vq.layouts`).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.errors import InputError, unknown
from lowbit.export.gguf import Overrides, expected, write_sources
from lowbit.export.gguf_read import read_gguf
from lowbit.export.gguf_types import TYPES, get
from lowbit.export.hf import export_hf
from lowbit.export.layouts import export_layout
from lowbit.export.sources import Sources, leaves, open_sources, unwrap
from lowbit.formats import adapter
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Format, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg import online
from lowbit.models import cache
from lowbit.models.cache import CacheSite, without
from lowbit.models.hf import FLOATS, load_hf, readers, stored_kinds
from lowbit.models.model import Model
from lowbit.tree import map_leaves
from lowbit.vq.layouts import LAYOUTS, Layout

TARGETS = ("gguf", "hf", "packed", *LAYOUTS)
KL_LIMIT = 1e-4  # nats per token, where the file holds the same weights
KL_BYTES = 2 << 30  # of a folder's model in float32: up to here it is loaded for the KL
TOKENS = (2, 64)  # of the comparison


class ExportMismatch(InputError):
    """The file that was just written does not hold the model it was written from."""


def targets() -> list[str]:
    """Every target that `export` takes."""
    return ["gguf", *(f"gguf:{t}" for t in TYPES), "hf", *(f"hf:{d}" for d in FLOATS), "packed", *LAYOUTS]


def export(
    source: Model | str | Path,
    to: str,
    out: str | Path,
    *,
    overrides: Overrides = (),
    embedding: str | None = None,
    drop_activations: bool = False,
    kl_bytes: int = KL_BYTES,
) -> dict[str, Any]:
    """Writes a model, or a Hugging Face folder (plain or packed), to the file (gguf) or folder `out`, reloads it and
    returns a report.

    A folder goes tensor by tensor, while writing and while comparing; only the KL needs the model and the reloaded file
    in memory, so it is left out for a folder whose model takes more than `kl_bytes` in float32.

    The report has `to`, `path`, `bytes`, `types` (number of tensors by type), `fresh` (float tensors that were
    quantized here), `rounded` (values that a float cast changed, by path), `notes`, `weights` (how many were compared,
    all equal), `kl_mean` and `kl_max` (of the reloaded file against the source, nats per token; None and a note where
    left out) and `seconds`. With `fresh` or `rounded` tensors the KL is the cost of that rounding; else it exceeds
    `KL_LIMIT` only by a fault.

    Raises `InputError` for what the target cannot hold and `ExportMismatch` when the file differs; it is left in place.
    """
    start = time.monotonic()
    kind, _, option = to.partition(":")
    if kind not in TARGETS or (option and kind not in ("gguf", "hf")):
        raise unknown("export target", to, targets())
    if kind != "gguf" and (overrides or embedding):
        raise InputError(f"overrides or embedding with target {to!r} (allowed: with gguf)")
    if kind == "hf" and option and option not in FLOATS:
        raise unknown("dtype of export target hf", option, FLOATS)
    report: dict[str, Any] = {"to": to, "path": str(out), "fresh": [], "rounded": {}, "notes": []}
    if not isinstance(source, Model) and Path(out).resolve() == Path(source).resolve():
        source = load_hf(source)  # is about to be replaced
    opened = open_sources(source, drop_activations or kind == "packed", online=kind == "packed")
    if kind == "gguf":
        r = write_sources(opened, out, option or "auto", overrides=overrides, embedding=embedding)
        report |= {"fresh": r.fresh, "rounded": r.rounded, "notes": r.notes, "types": _count(r.types.values())}
        report["weights"] = _compare_gguf(opened, out, r.types)
    else:
        if layout := LAYOUTS.get(kind):
            dtype: str | None = export_layout(source, out, kind, drop_activations)
            report["notes"] += [layout.note] * bool(layout.note)
            if layout.families and opened.config.family not in layout.families:
                allowed = " and ".join(layout.families)
                report["notes"].append(f"its runtime has no {opened.config.family} models, only {allowed}")
        else:
            dtype = export_hf(source, out, kind == "packed", option or None, drop_activations)
        compared = _compare_hf(source, dtype, out, kind == "packed", layout)
        report["weights"], report["rounded"], largest = compared
        if largest:
            report["notes"].append(f"rounded in the layout: weights differ by up to {largest:.2g} of the largest")
        kinds = stored_kinds(out).values()
        report["types"] = _count(k.name if isinstance(k, Format) else k for k in kinds)
    report["bytes"] = size(out)
    report["kl_mean"] = report["kl_max"] = None
    if isinstance(source, Model) or 4 * opened.config.num_params <= kl_bytes:
        _measure(source, read_gguf(out) if kind == "gguf" else load_hf(out), drop_activations, report)
    else:
        large = 4 * opened.config.num_params
        report["notes"].append(f"KL not computed for {large:,} bytes in float32 (only up to {kl_bytes:,})")
    report["seconds"] = time.monotonic() - start
    return report


def size(path: str | Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


# -- comparison -------------------------------------------------------------------------------------------------------


def _compare_gguf(opened: Sources, out: str | Path, types: dict[str, str]) -> int:
    """Every weight of the file, read by code that shares nothing with the writer (`verify`), against its source; one
    tensor at a time."""
    from lowbit.export import verify

    total = 0
    try:
        for path, kind, shape, parts in verify.weights(out, types):
            s = opened.tensors[path]
            if kind != types[path]:
                raise ExportMismatch(f"{out}: {path} has type {kind} (allowed: {types[path]}, as it was written)")
            if shape != s.shape:
                raise ExportMismatch(f"{out}: {path} has shape {list(shape)} (allowed: {list(s.shape)})")
            wanted, first, wrong = expected(path, s.load(), get(kind), opened.config), 0, 0
            for part in parts:
                wrong += int(np.count_nonzero(part != wanted(first, first + len(part))))
                first += len(part)
                total += part.size
            del wanted  # before the next tensor is loaded
            _none(wrong, path, out)
    except (ValueError, IndexError, KeyError) as e:
        if isinstance(e, InputError):
            raise
        raise ExportMismatch(f"{out}: the gguf library cannot read it: {e} (allowed: a whole GGUF file)") from e
    return total


def _compare_hf(
    source: Model | str | Path, dtype: str | None, out: str | Path, packed: bool, layout: Layout | None = None
) -> tuple[int, dict[str, int], float]:
    """Every weight of the folder against its source, one tensor at a time, and in a packed one what is done to inputs
    and caches; `dtype` is what floats were cast to. The packed weights of a `layout` may differ by its `slack`; the
    last of what is returned is the largest such difference, in parts of the largest weight of its tensor."""
    total, rounded, largest, found = 0, {}, 0.0, readers(out)
    for path, leaf in leaves(source):
        if packed and _beside(leaf) != _beside(found[path]()):
            raise ExportMismatch(f"{out}: {path} has other activation formats or transforms than it was written from")
        if isinstance(leaf, CacheSite):
            continue
        a, leaf = _float32(path, leaf), found[path]()
        b, foreign = _float32(path, leaf), layout is not None and isinstance(leaf, QTensor)
        del leaf
        if dtype is not None and not foreign:
            cast = a.astype(FLOATS[dtype]).astype(np.float32)
            if changed := int(np.count_nonzero(cast != a)):
                rounded[path] = changed
            a = cast
        off = a.size
        if a.shape == b.shape and (off := int(np.count_nonzero(a != b))) and foreign:
            rounded[path], far = off, np.abs(a - b)
            off = int(np.count_nonzero(far > layout.slack(a)))
            largest = max(largest, float(far.max() / np.abs(a).max()))
        _none(off, path, out)
        total += a.size
        del a, b
    return total, rounded, largest


def _beside(leaf: Any) -> Any:
    """What a leaf holds besides its weight: names and bytes."""
    if isinstance(leaf, PreparedInput):
        return *_named(*online.describe(leaf)), _beside(leaf.w)
    if isinstance(leaf, Adapter):
        return _named(*adapter.describe(leaf))
    return _named(*cache.describe(leaf)) if isinstance(leaf, CacheSite) else None


def _named(names: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    return names, {k: np.asarray(a).tobytes() for k, a in arrays.items()}


def _none(wrong: int, path: str, out: str | Path) -> None:
    if wrong:
        raise ExportMismatch(f"{out}: {wrong} weights of {path} differ from what it was written from (allowed: none)")


def _float32(path: str, leaf: Any) -> np.ndarray:
    leaf = unwrap(path, leaf, True, True)
    if isinstance(leaf, QTensor):
        leaf = dataclasses.replace(leaf, dtype="float32").decode()
    return np.asarray(leaf).astype(np.float32, copy=False)


def _measure(source: Model | str | Path, again: Model, drop_activations: bool, report: dict[str, Any]) -> None:
    """Puts the KL of the reloaded file into the report. Raises `ExportMismatch` where it shows a fault."""
    model = source if isinstance(source, Model) else load_hf(source)
    report["kl_mean"], report["kl_max"] = _divergence(model, again, drop_activations)
    if not np.isfinite(report["kl_mean"]) or (
        report["kl_mean"] > KL_LIMIT and not report["fresh"] and not report["rounded"]
    ):
        raise ExportMismatch(f"{report['path']}: KL {report['kl_mean']:.3g} to its source (allowed: {KL_LIMIT})")


def _divergence(model: Model, again: Model, drop_activations: bool) -> tuple[float, float]:
    """Mean and largest KL over random tokens, both computed in float32 from float32 decodes."""
    rows, length = TOKENS
    length = min(length, model.config.max_position, again.config.max_position)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))

    def plain(path: str, leaf: Any) -> Any:
        if drop_activations and isinstance(leaf, PreparedInput):
            leaf = dataclasses.replace(leaf, act=None, params={})
        return dataclasses.replace(leaf, dtype="float32") if isinstance(leaf, QTensor) else leaf

    trees = (without(m.params) if drop_activations else m.params for m in (model, again))
    both = (m.replace(params=map_leaves(plain, tree)) for m, tree in zip((model, again), trees))
    p, q = (jax.nn.log_softmax(m.logits(tokens)) for m in both)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return max(float(kl.mean()), 0.0), max(float(kl.max()), 0.0)


def _count(names: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for n in names:
        out[n] = out.get(n, 0) + 1
    return out

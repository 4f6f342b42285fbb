"""Writes GGUF files that llama.cpp loads, through the `gguf` library's writer, one tensor in memory at a time.

Packed weights are translated from their trained codes and scales (`translate`), never from floats. What each tensor
becomes:

- one-dimensional tensors (norms, biases): F32;
- embedding and head: a packed one in its own grid's type, a float one in its own dtype (`embedding=` overrides);
- a block's linears: packed ones in `type`; float ones are quantized fresh to `type` if the model has no packed weight
  at all (round to nearest, by the lowbit format of that name), else they keep their dtype, because then a plan has
  decided about them;
- `overrides`, `(regex, type)` pairs over paths, the first full match wins over all of that.

`type="auto"` is the type that a format is named for or usually fits, else the smallest that holds the tensor exactly;
floats keep their dtype.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import files
from lowbit.errors import InputError
from lowbit.export import gguf_arch as arch
from lowbit.export import translate
from lowbit.export.gguf_tokenizer import tokenizer_metadata
from lowbit.export.gguf_types import FLOAT_DTYPES, TYPES, GGMLType, get
from lowbit.export.sources import Source, Sources, open_sources
from lowbit.formats import base as formats
from lowbit.formats.base import Format, QTensor
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.models.shards import require_finite
from lowbit.ptq.rtn import encode

Overrides = Sequence[tuple[str, str]]
_KEEP = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TOP = ("model.embed_tokens", "lm_head")


@dataclasses.dataclass
class Report:
    """What was written: GGUF types by path, which floats were quantized fresh, and values that a cast rounded."""

    path: str
    bytes: int = 0
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    fresh: list[str] = dataclasses.field(default_factory=list)
    rounded: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def write_gguf(
    source: Model | str | Path,
    path: str | Path,
    type: str = "auto",
    *,
    overrides: Overrides = (),
    embedding: str | None = None,
    drop_activations: bool = False,
) -> Report:
    """Writes a model, or a Hugging Face folder (plain or packed), to one GGUF v3 file; both give the same bytes.

    Of a folder one tensor at a time is in memory; packed ones are read twice, to choose and check types and to write.
    `drop_activations` writes the weights of layers that also quantize their input, whose activation format the file
    cannot hold. Raises `InputError`, before anything is written, for an architecture, shape, level range or scale that
    the types cannot hold exactly; it names the tensors. After a fault that shows while writing no file is left.
    """
    opened = open_sources(source, drop_activations)
    return write_sources(opened, path, type, overrides=overrides, embedding=embedding)


def write_sources(
    opened: Sources, path: str | Path, type: str = "auto", *, overrides: Overrides = (), embedding: str | None = None
) -> Report:
    """`write_gguf` of sources that are open."""
    import gguf

    config, tokenizer, sources = opened.config, opened.tokenizer, opened.tensors
    arch.check(config)
    names = arch.tensor_names(config)
    missing = [p for p in names if p not in sources]
    if missing or len(sources) != len(names):
        raise InputError(f"parameters do not match the config: missing {missing[:4]}, extra {_extra(sources, names)}")
    report = Report(str(path))
    types = _assign(sources, type, overrides, embedding, report)
    report.types = {p: t.name for p, t in types.items()}
    if arch.context_length(config) < config.max_position:
        report.notes.append(
            f"context_length is the sliding window, {config.sliding_window}: llama.cpp has none for {config.family}"
        )
    if getattr(getattr(tokenizer, "model", None), "collapse_spaces", False):
        report.notes.append("tokenizer merges runs of spaces, which llama.cpp does not: such texts get other token ids")
    with files.atomic_path(path) as tmp:
        w = gguf.GGUFWriter(tmp, arch.ARCHITECTURES[config.family])
        w.add_type("model")
        w.add_string("general.name", Path(path).stem)
        w.add_file_type(_file_type(types, sources))
        if any(t.quantized for t in types.values()):
            w.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in (arch.metadata(config) | tokenizer_metadata(tokenizer, config)).items():
            _add(w, gguf, key, value)
        factors = arch.rope_factors(config)
        if factors is not None:
            w.add_tensor_info(arch.ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
        for p, gguf_name in names.items():
            s, t = sources[p], types[p]
            size = int(np.prod(s.shape)) // t.block * t.bytes
            # The element shape and a plain type id: the library's own enum does not know Q2_0 yet.
            w.add_tensor_info(gguf_name, s.shape, np.dtype(np.float32), size, raw_dtype=t.id)  # type: ignore[arg-type]
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        try:
            if factors is not None:
                w.write_tensor_data(factors)
            for p in names:
                w.write_tensor_data(_bytes(p, sources[p].load(), types[p], config, report))
        finally:
            w.close()
    report.bytes = Path(path).stat().st_size
    return report


# -- what each tensor becomes -----------------------------------------------------------------------------------------


def _assign(
    sources: Mapping[str, Source],
    type: str,
    overrides: Overrides,
    embedding: str | None,
    report: Report,
) -> dict[str, GGMLType]:
    """The type of every tensor; all that cannot be is raised in one error."""
    wanted = None if type.lower() == "auto" else get(type)
    top = None if embedding is None else get(embedding)
    rules = [(_regex(r), get(t)) for r, t in overrides]
    planned = any(s.format is not None for s in sources.values())
    used, chosen, out = set(), {}, {}
    for path, s in sources.items():
        rule = next((i for i, (r, _) in enumerate(rules) if r.fullmatch(path)), None)
        if rule is not None:
            used.add(rule)
            t = rules[rule][1]
        elif len(s.shape) == 1:
            t = TYPES["F32"]
        elif path in _TOP:
            t = top or (wanted if wanted and not wanted.quantized and s.format is None else None)
        elif s.format is None and planned and (wanted is None or wanted.quantized):
            t = None
        else:
            t = wanted
        chosen[path] = t
    for i, (rule, _) in enumerate(overrides):
        if i not in used:
            raise InputError(
                f"override {rule!r} matches no tensor (allowed: a regex over paths such as {next(iter(sources))})"
            )
    for step in (_fit_shape, _fit_values):  # all shapes before any value is loaded
        bad: dict[str, list[str]] = {}
        for path, s in sources.items():
            try:
                out[path] = step(s, chosen[path])
            except translate.Misfit as e:
                bad.setdefault(str(e), []).append(f"{path} {list(s.shape)}{' ' + s.format.name if s.format else ''}")
        for why, names in bad.items():
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            also = f"; {len(bad) - 1} more reasons for other tensors" if len(bad) > 1 else ""
            raise InputError(f"cannot write {', '.join(names[:3])}{more}: {why}{also}")
    report.fresh = [p for p, s in sources.items() if s.format is None and out[p].quantized]
    return out


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise InputError(f"override {text!r} is no regex: {e} (allowed: such as '.*down_proj')") from e


def _fit_shape(s: Source, t: GGMLType | None) -> GGMLType | None:
    """`t`, once the shape is known to fit it; for None the type of a float tensor. Raises `Misfit`."""
    if s.format is None and t is None:
        if s.dtype not in _KEEP:
            raise translate.Misfit(f"dtype {s.dtype} (allowed: {', '.join(_KEEP)})")
        return TYPES[_KEEP[s.dtype]]
    if s.format is None and t.quantized and len(s.shape) == 1:  # type: ignore[union-attr]
        raise translate.Misfit(f"one-dimensional tensors stay F32 (not {t.name})")  # type: ignore[union-attr]
    block = t or TYPES["Q8_0"]  # every type's block is a multiple of Q8_0's
    if s.shape[-1] % block.block:
        fits = [n for n, o in TYPES.items() if s.shape[-1] % o.block == 0]
        raise translate.Misfit(
            f"rows of {s.shape[-1]} weights are no multiple of {block.name}'s block of {block.block} "
            f"(allowed: {', '.join(fits)})"
        )
    return t


def _fit_values(s: Source, t: GGMLType | None) -> GGMLType:
    """`t`, or for None the packed tensor's own type, once its levels and scales are known to fit. Raises `Misfit`."""
    if s.format is None or (t is not None and not t.quantized):
        return t or TYPES[_KEEP[s.dtype]]
    g = translate.grid(s.load())
    if g is None:
        raise translate.Misfit(f"format {s.format.name} has no integer levels (allowed: F32, or another format)")
    if t is None:
        exact = translate.exact_types(g)
        if not exact:
            raise translate.Misfit(f"no GGUF block type holds it exactly (allowed: F32; tried {_why(g)})")
        usual = usual_type(s.format, s.shape)
        return TYPES[usual if usual in exact else exact[0]]
    try:
        translate.fit(g, t)
    except translate.Misfit as e:
        raise translate.Misfit(f"{e} (allowed: {', '.join([*translate.exact_types(g), 'F32'])})") from e
    return t


def _why(g: translate.Grid) -> str:
    try:
        translate.fit(g, TYPES["Q8_0"])
    except translate.Misfit as e:
        return f"Q8_0: {e}"
    return "all"


def usual_type(fmt: Format, shape: tuple[int, ...]) -> str:
    """Name of the type that a format's weights usually fit, empty if there is none."""
    family = fmt.name.split(":")[0]
    if family.upper() in TYPES:
        return family.upper()
    if family == "ternary":
        return "TQ2_0" if shape[1] % 256 == 0 else "Q2_0"
    by_family = {"int1": "Q2_0", "int2": "Q2_0", "int3": "Q4_0", "int4": "Q4_0", "int5": "Q5_0"}
    return (by_family | {f"int{b}": "Q8_0" for b in range(6, 9)}).get(family, "")


def _file_type(types: Mapping[str, GGMLType], sources: Mapping[str, Source]) -> int:
    """The ftype of most weights in the blocks."""
    count: collections.Counter[str] = collections.Counter()
    for path, t in types.items():
        if len(sources[path].shape) == 2 and path not in _TOP:
            count[t.name] += int(np.prod(sources[path].shape))
    return TYPES[count.most_common(1)[0][0]].ftype


# -- bytes ------------------------------------------------------------------------------------------------------------


def _bytes(path: str, leaf: Any, t: GGMLType, config: ModelConfig, report: Report) -> np.ndarray:
    """A tensor as it lies in the file: uint8, rows in the file's order."""
    if isinstance(leaf, QTensor) and not t.quantized:
        leaf = leaf.format.decode(dataclasses.replace(leaf, dtype="float32"))
    if t.quantized:
        q = leaf if isinstance(leaf, QTensor) else fresh(leaf, t)
        try:
            data = translate.encode(translate.grid(q), t)  # type: ignore[arg-type]
        except translate.Misfit as e:
            raise InputError(f"cannot write {path}: {e}") from e
    else:
        x = np.asarray(leaf)
        require_finite(x, path, "cannot write")
        if config.norm_plus_one and path.endswith("norm"):
            x = np.float32(1.0) + x.astype(np.float32)
        data = _cast(path, x, t, report)
    data = arch.to_file_rows(data, path, config)
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1)


def fresh(w: Any, t: GGMLType) -> QTensor:
    """A float weight rounded to nearest in the lowbit format of a GGUF type."""
    return encode(formats.get(t.format), w)


def _cast(path: str, x: np.ndarray, t: GGMLType, report: Report) -> np.ndarray:
    """Floats in a float type. Rounding is counted in the report; what would overflow is refused."""
    dtype = FLOAT_DTYPES[t.name]
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if t.name == "F32":
        return y
    if not np.isfinite(y).all():
        top = np.abs(x.astype(np.float32)).max()
        raise InputError(f"{path} holds {top:.6g}, beyond {t.name} (allowed: BF16 or F32 here)")
    changed = int(np.count_nonzero(y.astype(np.float32) != x.astype(np.float32)))
    if changed:
        report.rounded[path] = changed
    return y


def expected(path: str, leaf: Any, t: GGMLType, config: ModelConfig) -> Callable[[int, int], np.ndarray]:
    """Rows `[start, stop)` in float32 that a file must hold for this leaf in type `t`: what a reader of the bytes is
    checked against. Floats are converted by the row."""
    if isinstance(leaf, QTensor) or t.quantized:
        q = leaf if isinstance(leaf, QTensor) else fresh(leaf, t)
        leaf = q.format.decode(dataclasses.replace(q, dtype="float32"))
    x = np.asarray(leaf)
    one = np.float32(config.norm_plus_one and path.endswith("norm"))

    def rows(start: int, stop: int) -> np.ndarray:
        part = x[start:stop]
        part = one + part.astype(np.float32) if one else part
        part = part if t.quantized else part.astype(FLOAT_DTYPES[t.name], copy=False)
        return part.astype(np.float32, copy=False)

    return rows


def _extra(sources: Iterable[str], names: Iterable[str]) -> list[str]:
    return sorted(set(sources) - set(names))[:4]


def _add(w: Any, gguf: Any, key: str, value: Any) -> None:
    V = gguf.GGUFValueType
    match value:
        case bool():
            w.add_key_value(key, value, V.BOOL)
        case int():
            w.add_key_value(key, value, V.UINT32)
        case float():
            w.add_key_value(key, value, V.FLOAT32)
        case str():
            w.add_key_value(key, value, V.STRING)
        case _:
            w.add_key_value(key, value, V.ARRAY)

"""A GGUF file straight from a Hugging Face folder: load, quantize and write one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import InputError
from lowbit.export.gguf import Overrides, Report, Source, unwrap, write_sources
from lowbit.formats.base import Format
from lowbit.formats.floats import FloatFormat
from lowbit.models import hf
from lowbit.plan import INPUT, Plan
from lowbit.ptq.rtn import quantize_leaf


def stream_gguf(
    src: str | Path,
    out: str | Path,
    type: str = "auto",
    *,
    plan: Plan | Mapping[str, Any] | None = None,
    overrides: Overrides = (),
    embedding: str | None = None,
) -> Report:
    """Writes the folder `src` (plain or packed) as GGUF, weights rounded to nearest by `plan` if there is one.

    In memory is one tensor, in float32 and as codes. As values are not known beforehand, `auto` takes the type that
    the format usually fits (`gguf.static_type`). Rows that are no whole blocks are refused before anything is loaded;
    a tensor whose levels or scales do not fit stops the export, and no file is left. Other arguments and errors
    as in `write_gguf`.
    """
    from lowbit.data.tokenizer import Tokenizer

    src = Path(src)
    config = hf.load_config(src)
    assignment: Mapping[str, Any] = plan.resolve(config.shapes()) if isinstance(plan, Plan) else plan or {}
    if inputs := [s for s in assignment if s.endswith(INPUT)]:
        raise InputError(f"activation format for {inputs[0]!r}, which a GGUF file cannot hold (allowed: weights only)")
    leaves = hf.iter_tensors(src)

    def load(path: str) -> Any:
        found, leaf = next(leaves)
        if found != path:
            raise RuntimeError(f"expected {path} next, got {found}")
        return unwrap(path, quantize_leaf(path, leaf, assignment))

    shapes = config.shapes()
    sources = {}
    for path, kind in hf.stored_kinds(src).items():
        fmt = assignment.get(path, kind if isinstance(kind, Format) else None)
        if isinstance(fmt, FloatFormat):
            kind, fmt = {"bf16": "bfloat16", "fp16": "float16", "f32": "float32"}[fmt.name], None
        sources[path] = Source(shapes[path], str(kind), fmt, lambda path=path: load(path))
    has_tokenizer = any((src / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer.from_dir(src) if has_tokenizer else None
    return write_sources(
        config, tokenizer, sources, out, type, overrides=overrides, embedding=embedding, name=src.name, static=True
    )

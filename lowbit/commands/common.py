"""What the commands share: their result, the option types, and how a result becomes JSON."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.errors import InputError

command_line: list[str] = []  # the words after `lowbit`, for the records of a run

Model = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
Flag = tyro.conf.FlagCreatePairsOff[bool]
# Options that may be absent: their help says what then, so tyro's "{None}|STR" and "(default: None)" are left out.
Word = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
WordPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Result:
    """`data` is printed with `--json`, `text` without."""

    data: dict[str, Any]
    text: str


def result(data: dict[str, Any], text: str) -> Result:
    """A `Result` whose data are plain JSON values (NaN and infinity become null, which JSON lacks)."""
    return Result(plain(data), text)


def plain(value: Any) -> Any:
    """Python values of dataclasses, tuples, paths, and numbers of array libraries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def lines(data: dict[str, Any]) -> str:
    """`key  value`, aligned; absent values are left out."""
    shown = {k: v for k, v in data.items() if v is not None}
    width = max((len(k) for k in shown), default=0)
    return "\n".join(f"{k.ljust(width)}  {number(v)}" for k, v in shown.items())


def number(value: Any) -> str:
    """A value for a person: thousands separated, six significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def check_output(path: Path, force: bool) -> None:
    """Raises `InputError` when an output exists (an empty folder does not count) and `--force` was not given, or when
    it cannot be created: better now than after the work."""
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    if there and not force:
        raise InputError(f"output {path} exists (allowed: a new path, or --force to replace it)")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises `InputError` unless the nearest folder above `path` that exists can be written to."""
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "is not writable" if above.is_dir() else "is a file"
        raise InputError(f"cannot write {path}: {above} {why} (allowed: a path in a writable folder)")


def with_runtime(model: Any, options: Any) -> Any:
    """The model with the cache and activation formats of a command's options `kv`, `k_cache`, `v_cache`, `kv_rotate`
    and `act`. Raises `InputError`."""
    from lowbit.models.cache import sites, with_caches
    from lowbit.models.model import with_inputs

    k, v = options.k_cache or options.kv, options.v_cache or options.kv
    if options.kv_rotate and k is None and v is None and not any(s.format for s in sites(model.params).values()):
        raise InputError("--kv-rotate without a cache format (allowed: with --kv, --k-cache or --v-cache)")
    if k is not None or v is not None or options.kv_rotate:
        model = with_caches(model, k, v, options.kv_rotate)
    return model if options.act is None else with_inputs(model, options.act)


def with_rules(plan: Any, options: Any) -> Any:
    """The plan with the formats of a command's options `act`, `kv`, `k_cache` and `v_cache` as rules for every linear
    and every cache inside blocks. Raises `InputError` for formats that do not exist, and when the plan has rules of
    that kind."""
    from lowbit.formats.activation import get_act
    from lowbit.formats.kv import get_kv
    from lowbit.plan import Plan, Rule, kind_of

    k, v = options.k_cache or options.kv, options.v_cache or options.kv
    found = (
        ("input", "act", ".*:in", options.act),
        ("cache", "kv", r".*\.k_cache", k),
        ("cache", "kv", r".*\.v_cache", v),
    )
    rules = []
    for kind, option, match, name in found:
        if name is None:
            continue
        (get_act if kind == "input" else get_kv)(name)
        if taken := [r.match for r in plan.rules if kind_of(r.match) == kind]:
            what = {"input": "activations", "cache": "caches"}[kind]
            raise InputError(f"--{option} {name} with a rule for {what}, {taken[0]!r} (allowed: one of the two)")
        rules.append(Rule(rf"model\.layers\.{match}", name))
    return Plan((*rules, *plan.rules), plan.default)


def folder_of(source: str) -> Path | None:
    """The local folder of a model in Hugging Face layout: a run directory's is `model/`, a hub id's its snapshot; None
    for a file of another kind. Raises `InputError` for what is no model."""
    from lowbit.export.open import find_folder

    return find_folder(source)


def load(source: str) -> Any:
    """`open_model`, with a run directory resolved to the folder whose bytes are the model's."""
    from lowbit.export.open import open_model

    return open_model(folder_of(source) or source)

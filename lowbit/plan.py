"""Which site gets which format: ordered regex rules over parameter paths.

A site is a two-dimensional weight, named by its path (`model.layers.0.mlp.up_proj`); the input of one, named `path:in`;
or what a layer keeps of past tokens, `model.layers.0.self_attn.k_cache` and `v_cache`. A rule's regex must match a
whole site and the first rule that matches wins. A pattern that ends in `:in` addresses inputs, one with `_cache` in it
caches, any other weights. The format `bf16` keeps a tensor as it is, in the dtype that it came in.

    [[rule]]
    match = 'model\\.layers\\.(0|7)\\..*'
    format = "int8:channel"
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.errors import InputError, unknown
from lowbit.formats import base
from lowbit.formats.activation import ActFormat, get_act
from lowbit.formats.base import Format
from lowbit.formats.kv import KVFormat, get_kv

KEEP = "bf16"
KEPT = {"bfloat16": "bf16", "float16": "fp16", "float32": "f32"}  # how the table calls what is kept
BLOCK_LINEARS = r"(?:.*\.)?layers\.\d+\..*"
INPUT = ":in"
CACHES = ("k_cache", "v_cache")

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """`format` for the sites that the regex `match` covers entirely."""

    match: str
    format: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the plan's table; `bytes` are stored bytes, `bits` are `8 * bytes / weights`. What is `kept` is in
    the dtype that it came in."""

    site: str
    shape: tuple[int, ...]
    rule: str
    format: str
    bits: float
    bytes: int
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ordered rules; `default` is the format of the linears inside blocks that no rule matches (None: kept)."""

    rules: tuple[Rule, ...] = ()
    default: str | None = None

    @classmethod
    def uniform(cls, format: str) -> "Plan":
        """Every linear inside a block gets `format`; embeddings, head and norms stay as they are."""
        return cls((), format)

    @classmethod
    def load(cls, path: str | Path, default: str | None = None) -> "Plan":
        """Reads a TOML rules file. Raises `InputError` on unreadable TOML, unknown keys or missing keys."""
        try:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise InputError(f"cannot read rules file {path}: {e.strerror}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise InputError(f"rules file {path} is not TOML: {e}") from e
        for key in raw.keys() - {"rule"}:
            raise unknown(f"key in rules file {path}", key, ["rule"])
        entries = raw.get("rule", [])
        if not isinstance(entries, list) or not entries:
            raise InputError(f"rules file {path} has no rules (allowed: [[rule]] tables with match and format)")
        return cls(tuple(_rule(path, i, entry) for i, entry in enumerate(entries, 1)), default)

    def resolve(self, shapes: Shapes) -> dict[str, Format | ActFormat | KVFormat]:
        """`{site: format}` of every quantized site of a model with these parameters; kept tensors are left out.

        Raises `InputError` on a bad regex, an unknown format, a rule that matches nothing (or only what earlier
        rules took), and shapes that a format cannot hold.
        """
        return {site: fmt for site, _, fmt in self._assign(shapes) if fmt is not None}

    def table(self, shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> list[Row]:
        """One row for every tensor, quantized input and cache, in model order. Nothing is computed on arrays.

        `dtypes` are those of the source by path (`float32`, ...), which kept tensors stay in; bfloat16 by default.
        """
        assigned = {site: (rule, fmt) for site, rule, fmt in self._assign(shapes)}
        rows = []
        for path, shape in shapes.items():
            rule, fmt = assigned.get(path, ("-", None))
            if fmt is None:
                dtype = (dtypes or {}).get(path, "bfloat16")
                name, nbytes = KEPT[dtype], jnp.dtype(dtype).itemsize * math.prod(shape)
            else:
                name, nbytes = fmt.name, encoded_bytes(fmt, tuple(shape))
            bits = 8 * nbytes / math.prod(shape)
            rows.append(Row(path, tuple(shape), rule, name, bits, nbytes, fmt is None))
            for site, length in ((path + INPUT, shape[-1]), (_cache_of(path), shape[0])):
                if site in assigned and assigned[site][1] is not None:
                    rows.append(Row(str(site), (length,), assigned[site][0], assigned[site][1].name, 0.0, 0))
        return rows

    def _assign(self, shapes: Shapes) -> list[tuple[str, str, Any]]:
        """`(site, rule text, format or None to keep)` of every site that a rule or the default covers."""
        compiled = [_compile(i, rule) for i, rule in enumerate(self.rules, 1)]
        default = None if self.default in (None, KEEP) else base.get(str(self.default))
        weights = [p for p, s in shapes.items() if len(s) == 2]
        sites = weights + [p + INPUT for p in weights if not p.endswith("embed_tokens")]
        sites += [site for p in weights if (site := _cache_of(p)) is not None]
        matched, won = [0] * len(compiled), [0] * len(compiled)
        out: list[tuple[str, str, Any]] = []
        refused: dict[str, list[str]] = {}
        for site in sites:
            hit: tuple[str, Any] | None = None
            for i, (regex, fmt) in enumerate(compiled):
                if kind_of(regex.pattern) == kind_of(site) and regex.fullmatch(site):
                    matched[i] += 1
                    if hit is None:
                        won[i] += 1
                        hit = (regex.pattern, fmt)
            if hit is None and self.default is not None and re.fullmatch(BLOCK_LINEARS, site):
                if kind_of(site) == "weight":
                    hit = ("(default)", default)
            if hit is None:
                continue
            out.append((site, *hit))
            if hit[1] is not None and kind_of(site) != "cache":  # whose heads' sizes the shapes do not tell
                shape = tuple(shapes[site.removesuffix(INPUT)])
                shape = shape[1:] if site.endswith(INPUT) else shape
                try:
                    hit[1].check(shape)
                except InputError as e:
                    refused.setdefault(hit[1].name, []).append(f"{site} {list(shape)}: {e}")
        for i, rule in enumerate(self.rules):
            if not matched[i]:
                raise InputError(
                    f"rule {i + 1}: match {rule.match!r} matches nothing ({_nearby(sites, kind_of(rule.match))})"
                )
            if not won[i]:
                raise InputError(f"rule {i + 1}: match {rule.match!r} matches only what earlier rules took")
        if self.default is not None and not any(re.fullmatch(BLOCK_LINEARS, p) for p in weights):
            raise InputError(f"format {self.default!r} matches nothing: no linears inside blocks ({_nearby(sites)})")
        for name, lines in refused.items():
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise InputError(f"format {name!r} cannot hold {'; '.join(lines[:3])}{more}")
        return out


def total(rows: Sequence[Row]) -> tuple[int, float, float]:
    """`(bytes, bits per weight of the model, bits per weight of the quantized tensors)`, the last 0 if none are."""
    weights = [r for r in rows if kind_of(r.site) == "weight"]
    quantized = [r for r in weights if not r.kept]
    nbytes = sum(r.bytes for r in weights)
    n, nq = sum(math.prod(r.shape) for r in weights), sum(math.prod(r.shape) for r in quantized)
    return nbytes, 8 * nbytes / n if n else 0.0, 8 * sum(r.bytes for r in quantized) / nq if nq else 0.0


def render(rows: Sequence[Row]) -> str:
    """The table as text; layers that agree share a line (`layers.{0-7}`), whose bytes are their sum."""
    merged: dict[tuple[Any, ...], list[tuple[int | None, Row]]] = {}
    for row in rows:
        m = re.search(r"(?<=layers\.)\d+(?=\.)", row.site)
        name = row.site if m is None else f"{row.site[: m.start()]}*{row.site[m.end() :]}"
        key = (name, row.shape, row.rule, row.format)
        merged.setdefault(key, []).append((None if m is None else int(m.group()), row))
    lines = [("site", "shape", "rule", "format", "bits", "bytes")]
    for (name, shape, rule, fmt), group in merged.items():
        layers = [i for i, _ in group if i is not None]
        site = name.replace("*", "{" + _spans(layers) + "}" if len(layers) > 1 else str(layers[0])) if layers else name
        size = "x".join(map(str, shape))
        lines.append((site, size, rule, fmt, f"{group[0][1].bits:.3f}", str(sum(r.bytes for _, r in group))))
    nbytes, bits, quantized = total(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    body = ["  ".join(c.rjust(w) if i > 3 else c.ljust(w) for i, (c, w) in enumerate(zip(ln, widths))) for ln in lines]
    summary = f"total {nbytes} bytes, {bits:.3f} bits per weight, {quantized:.3f} in quantized tensors"
    return "\n".join([line.rstrip() for line in body] + [summary])


@cache
def encoded_bytes(fmt: Format, shape: tuple[int, int]) -> int:
    """Stored bytes of one weight, by abstract evaluation of `encode`: exact, and nothing is allocated."""
    arrays = jax.eval_shape(lambda w: fmt.encode(w).arrays, jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(base.stored_bytes(a) for a in arrays.values())


def _rule(path: str | Path, number: int, entry: Any) -> Rule:
    if not isinstance(entry, dict):
        raise InputError(f"rules file {path}, rule {number}: {entry!r} (allowed: a table with match and format)")
    for key in entry.keys() - {"match", "format"}:
        raise unknown(f"key in rules file {path}, rule {number}:", key, ["match", "format"])
    for key in ("match", "format"):
        if not isinstance(entry.get(key), str):
            raise InputError(f"rules file {path}, rule {number}: {key} is {entry.get(key)!r} (allowed: a string)")
    return Rule(entry["match"], entry["format"])


def _compile(number: int, rule: Rule) -> tuple[re.Pattern[str], Any]:
    try:
        regex = re.compile(rule.match)
    except re.error as e:
        raise InputError(f"rule {number}: match {rule.match!r} is not a regular expression: {e}") from e
    if rule.format == KEEP:
        return regex, None
    try:
        return regex, {"input": get_act, "cache": get_kv, "weight": base.get}[kind_of(rule.match)](rule.format)
    except InputError as e:
        raise InputError(f"rule {number}: {e}") from e


def kind_of(site: str) -> str:
    """What a site is, or a pattern addresses."""
    return "input" if site.endswith(INPUT) else "cache" if "_cache" in site else "weight"


def _cache_of(path: str) -> str | None:
    """The cache site that a projection of keys or values fills."""
    return f"{path.removesuffix('_proj')}_cache" if path.endswith((".self_attn.k_proj", ".self_attn.v_proj")) else None


def _nearby(sites: Sequence[str], kind: str = "weight") -> str:
    same = [s for s in sites if kind_of(s) == kind]
    shown = ", ".join(same[:2]) + (f", ... {same[-1]}" if len(same) > 2 else "")
    return f"allowed: a regex that matches a whole path of {len(same)} {kind}s: {shown}" if same else f"no {kind}s"


def _spans(numbers: Sequence[int]) -> str:
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)

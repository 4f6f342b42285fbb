"""A report of measured models: one table and a quality–size plot, as Markdown, PNG and one self-contained HTML page.

A row is a mapping; every key is optional but `name`:

    name                        what the row is called
    method, format              "QAT", "q4_0": colour and label in the plot (default: the name)
    file_bytes                  bytes on disk
    bits_per_weight             all stored bits / all parameters
    bits_per_weight_quantized   the same over quantized tensors only
    perplexity, nats_per_token, kl_mean, kl_p99, same_top1, seconds, ...

A row without `file_bytes` (a noise floor, say) is drawn as a horizontal line; a row without `kl_mean`, or with one of
zero (the reference itself), as a vertical line at its size. Keys the table does not know become columns of their own.
"""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit import files
from lowbit.errors import InputError
from lowbit.experiment import plot
from lowbit.experiment.run import scalar

Row = Mapping[str, Any]

# key: (title, format); the order of the table
COLUMNS: dict[str, tuple[str, str]] = {
    "name": ("model", "s"),
    "file_bytes": ("file bytes", ",d"),
    "bits_per_weight": ("bits/weight", ".3f"),
    "bits_per_weight_quantized": ("bits/weight (quantized)", ".3f"),
    "perplexity": ("perplexity", ".3f"),
    "nats_per_token": ("nats/token", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "kl_mean": ("KL mean", "kl"),
    "kl_median": ("KL median", "kl"),
    "kl_p90": ("KL p90", "kl"),
    "kl_p99": ("KL p99", "kl"),
    "kl_p99_9": ("KL p99.9", "kl"),
    "same_top1": ("same top-1", "%"),
    "seconds": ("seconds", ".1f"),
}
HIDDEN = ("method", "format", "convention", "tokens", "windows", "perplexity_stderr", "kl_mean_stderr")
DEFAULT = ("file_bytes", "bits_per_weight", "bits_per_weight_quantized", "perplexity", "nats_per_token", "kl_mean",
           "kl_p99", "same_top1", "seconds")  # fmt: skip


def write_report(rows: Sequence[Row], out_dir: str | Path, title: str, notes: str = "") -> dict[str, Path]:
    """Writes report.md, report.html, report.png, results.json and results.csv; returns `{name: path}`.

    `notes` is text put above the table, paragraphs separated by empty lines. Raises `InputError` without rows, for a
    row without a name, or when the folder cannot be written.
    """
    if not rows:
        raise InputError(f"report {title!r} has 0 rows (needed: at least 1)")
    for i, row in enumerate(rows):
        if not row.get("name"):
            raise InputError(f"report row {i} has name {row.get('name')!r} (needed: a non-empty text)")
    out = Path(out_dir)
    png = plot.draw(rows, title)
    outputs = {
        "results.json": json.dumps([_plain(r) for r in rows], indent=2, allow_nan=False).encode() + b"\n",
        "results.csv": _csv(rows).encode(),
        "report.png": png,
        "report.md": _markdown(rows, title, notes).encode(),
        "report.html": _html(rows, title, notes, png).encode(),
    }
    for name, data in outputs.items():
        files.write_bytes(out / name, data)
    return {name: out / name for name in outputs}


def _plain(row: Row) -> dict[str, Any]:
    """JSON values: numbers of array libraries as Python's own, NaN and infinity as strings."""
    return {k: v if isinstance(v, list | dict) else scalar(v, k) for k, v in row.items()}


def table(rows: Sequence[Row], keys: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Titles and formatted cells of the columns that any row fills; an absent value is an en dash."""
    keys = list(keys or columns(rows))
    return [COLUMNS.get(k, (k.replace("_", " "), ""))[0] for k in keys], [
        [cell(k, row.get(k)) for k in keys] for row in rows
    ]


def columns(rows: Sequence[Row]) -> list[str]:
    """Keys shown, in order: the known ones that some row fills, then the others as they first appear."""
    present = {k: None for row in rows for k, v in row.items() if v is not None and k not in HIDDEN}
    known = [k for k in COLUMNS if k in present and (k == "name" or k in DEFAULT)]
    return known + [k for k in present if k not in COLUMNS and not isinstance(_first(rows, k), list | dict)]


def _first(rows: Sequence[Row], key: str) -> Any:
    return next(r[key] for r in rows if r.get(key) is not None)


def cell(key: str, value: Any) -> str:
    """One value as text."""
    if value is None:
        return "–"
    spec = COLUMNS.get(key, ("", ""))[1]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if spec == "%":
        return f"{100 * value:.2f} %"
    if spec == "kl":
        return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"
    if spec == ",d":
        return f"{round(value):,}"
    return format(value, spec or (".4g" if isinstance(value, float) else ",d"))


def text_table(rows: Sequence[Row]) -> str:
    """An aligned table for a terminal."""
    titles, cells = table(rows)
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in [titles, *cells]
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _markdown(rows: Sequence[Row], title: str, notes: str) -> str:
    titles, cells = table(rows)
    escape = lambda line: "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |"  # noqa: E731
    rule = "|" + "|".join([":---", *["---:"] * (len(titles) - 1)]) + "|"
    body = "\n".join([escape(titles), rule, *map(escape, cells)])
    return f"# {title}\n\n" + (f"{notes.strip()}\n\n" if notes.strip() else "") + f"{body}\n\n![{title}](report.png)\n"


def _csv(rows: Sequence[Row]) -> str:
    keys = list({k: None for row in rows for k in row})
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _html(rows: Sequence[Row], title: str, notes: str, png: bytes) -> str:
    keys = columns(rows)
    titles, cells = table(rows, keys)
    head = "".join(f'<th><button type="button">{html.escape(t)}</button></th>' for t in titles)
    body = ""
    for row, line in zip(rows, cells):
        values = [row.get(k) for k in keys]
        body += "<tr>" + "".join(
            f'<td data-v="{html.escape(str(v if v is not None else ""))}">{html.escape(c)}</td>'
            for v, c in zip(values, line)
        )  # fmt: skip
        body += "</tr>\n"
    paragraphs = "".join(f"<p>{html.escape(p)}</p>\n" for p in notes.strip().split("\n\n") if p)
    image = base64.b64encode(png).decode()
    return (
        PAGE.replace("@TITLE@", html.escape(title))
        .replace("@NOTES@", paragraphs)
        .replace("@HEAD@", head)
        .replace("@BODY@", body)
        .replace("@IMAGE@", image)
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
p { max-width: 48rem; white-space: pre-line; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1.5rem 0; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; vertical-align: bottom; padding: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; padding: .35rem .75rem; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: #f4f6fa; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
@NOTES@<div class="wide"><table>
<thead><tr>@HEAD@</tr></thead>
<tbody>
@BODY@</tbody>
</table></div>
<img alt="Quality against size" src="data:image/png;base64,@IMAGE@">
<script>
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const th = button.parentElement, up = th.ariaSort !== "ascending";
  document.querySelectorAll("th").forEach(t => t.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = document.querySelector("tbody"), value = tr => tr.cells[column].dataset.v;
  [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  }).forEach(tr => body.append(tr));
}));
</script>
</body>
</html>
"""

"""The quality–size plot: KL divergence (or perplexity) against file size, with the Pareto front."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Point = tuple[float | int, float | int]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # readable when colour-blind
CROWDED = 20  # points of a panel from which on only the best are named
MARKERS = "osD^vP*X"
PANELS = {"kl_mean": "KL divergence to the reference, mean (nats)", "perplexity": "perplexity"}


@dataclasses.dataclass
class Marks:
    """What labels must name and keep off: points `(x, y, label)`, lines `("v" or "h", at, label)`, the front."""

    points: list[tuple[float | int, float | int, str]] = dataclasses.field(default_factory=list)
    lines: list[tuple[str, float | int, str]] = dataclasses.field(default_factory=list)
    front: list[Point] = dataclasses.field(default_factory=list)


def draw(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: one panel per quality measure that any row has, a note instead where there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: it takes a second
    from matplotlib.figure import Figure

    panels = [k for k in PANELS if any(_number(r.get(k)) and r.get("file_bytes") for r in rows)]
    figure = Figure(figsize=(6.4 * max(len(panels), 1), 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    figure.suptitle(title, fontsize=12)
    marks = [_panel(ax, rows, key) for ax, key in zip(axes, panels)]
    if not panels:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no row has a size and a quality", ha="center", va="center")
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.draw_without_rendering()
    for ax, mark in zip(axes, marks):
        _place_labels(figure, ax, mark)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other point beats in both size and quality (smaller is better in both), by size."""
    front: list[Point] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _panel(ax: Any, rows: Sequence[Row], key: str) -> Marks:
    methods = list(dict.fromkeys(str(r.get("method") or "models") for r in rows if r.get("file_bytes")))
    unit, scale = _unit(max(r["file_bytes"] for r in rows if r.get("file_bytes")))
    marks = Marks()
    for row in rows:
        size, quality = row.get("file_bytes"), row.get(key)
        label = str(row.get("format") or row["name"])
        if size and _number(quality):
            method = str(row.get("method") or "models")
            i = methods.index(method)
            known = method in ax.get_legend_handles_labels()[1]
            ax.plot(
                size / scale, quality, MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=7,
                markeredgecolor="white", markeredgewidth=0.8, zorder=3, label=None if known else method,
            )  # fmt: skip
            marks.points.append((size / scale, quality, label))
        elif size and key == "kl_mean":
            ax.axvline(size / scale, color="#999999", linestyle=":", linewidth=1.2, zorder=1)
            marks.lines.append(("v", size / scale, str(row["name"])))
        elif not size and key == "kl_mean" and _number(quality):
            ax.axhline(quality, color="#999999", linestyle="--", linewidth=1.2, zorder=1)
            marks.lines.append(("h", quality, str(row["name"])))
    marks.front = pareto([p[:2] for p in marks.points])
    if len(marks.front) > 1:
        ax.plot(*zip(*marks.front), color="#444444", linewidth=1, alpha=0.6, zorder=2, label="Pareto front")
    _scale(ax, "x", [p[0] for p in marks.points])
    _scale(ax, "y", [p[1] for p in marks.points])
    ax.margins(x=0.16, y=0.14)
    ax.set_xlabel(f"file size ({unit})")
    ax.set_ylabel(PANELS[key])
    ax.grid(True, which="major", color="#e6e6e6", linewidth=0.8, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    return marks


def _unit(largest: float | int) -> tuple[str, float]:
    for name, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= scale:
            return name, scale
    return "bytes", 1.0


def _scale(ax: Any, axis: str, values: Sequence[float | int]) -> None:
    """Logarithmic from a factor of 3 on; ticks always as plain numbers, 1-2-5 when few decades are shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values or max(values) < 3 * min(values):
        return
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    which = ax.xaxis if axis == "x" else ax.yaxis
    ratio = max(values) / min(values)
    subs = (1, 1.5, 2, 3, 4, 6, 8) if ratio < 12 else (1, 2, 5) if ratio < 300 else (1,)
    which.set_major_locator(LogLocator(subs=subs))
    which.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v >= 1e-3 else f"{v:.0e}".replace("e-0", "e-")))
    which.set_minor_formatter(NullFormatter())


def labelled(marks: Marks) -> list[tuple[float | int, float | int, str]]:
    """The points that get a label: all, or those on the Pareto front where labels would cover one another."""
    return marks.points if len(marks.points) <= CROWDED else [p for p in marks.points if p[:2] in marks.front]


def _place_labels(figure: Any, ax: Any, marks: Marks) -> None:
    """Puts each label at the nearest place around its point that hits no other label, point or the frame; a thin line
    leads to those that found none close by."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    pixel = figure.dpi / 72
    points = [ax.transData.transform((x, y)) for x, y, _ in marks.points]
    taken = [Bbox.from_bounds(px - 4 * pixel, py - 4 * pixel, 8 * pixel, 8 * pixel) for px, py in points]
    for kind, at, name in marks.lines:
        if kind == "v":
            text = ax.annotate(
                name, (at, 1), xycoords=("data", "axes fraction"), xytext=(-3, -2), textcoords="offset points",
                rotation=90, ha="right", va="top", fontsize=8, color="#666666",
            )  # fmt: skip
        else:
            text = ax.annotate(
                name, (0, at), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points",
                ha="left", va="bottom", fontsize=8, color="#666666",
            )  # fmt: skip
        taken.append(text.get_window_extent(renderer))
    taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in _along(ax, frame, marks)]
    around = ((7, 0), (-7, 0), (0, 8), (0, -8), (6, 7), (-6, 7), (6, -7), (-6, -7))
    places = [(dx * r, dy * r, r) for r in (1, 2, 3.2, 5, 7, 9, 12) for dx, dy in around]
    leader = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    named = labelled(marks)
    near = {label: box for label, box in zip(marks.points, taken) if label in named}
    for (x, y, label), own in near.items():
        best = None
        for dx, dy, r in places:
            ha = "left" if dx > 0 else "right" if dx < 0 else "center"
            va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = ax.annotate(
                label, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8,
                arrowprops=leader if r > 2 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the leader
            hits = sum(box.overlaps(b) for b in taken if b is not own)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = hits + 2 * outside
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        if best is not None:
            taken.append(best[2])


def _along(ax: Any, frame: Any, marks: Marks) -> list[list[float]]:
    """Pixels along every drawn line, so that labels keep off them."""
    import numpy as np

    spans = []
    for kind, at, _ in marks.lines:
        x, y = ax.transData.transform((at, at))
        spans.append([(x, frame.y0), (x, frame.y1)] if kind == "v" else [(frame.x0, y), (frame.x1, y)])
    front = [tuple(ax.transData.transform(p)) for p in marks.front]
    spans += [list(pair) for pair in zip(front, front[1:])]
    return [p for a, b in spans for p in np.linspace(a, b, 120).tolist()]

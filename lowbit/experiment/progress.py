"""Progress on stderr: a bar on a terminal, one plain line every so many steps elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """`update(step, loss=...)` as work goes on; use as a context manager. Standard output stays free for results."""

    def __init__(self, label: str, total: int, every: int | None = None, stream: Any = None, pause: float = 0.0):
        """`every`: steps between plain lines (default: a twentieth of `total`); `pause`: least seconds between them."""
        self.label, self.total, self.pause = label, max(total, 1), pause
        self.every = every or max(1, self.total // 20)
        self.stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._first = self._printed = 0
        self._bar: Any = None
        self._task: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=Console(file=self.stream),
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=self.total, note="")
            self._bar.start()

    def resume(self, step: int) -> None:
        """Work starts at `step`, not 0."""
        self._first = self._printed = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(self, step: int, **values: Any) -> None:
        """`step` of `total` are done; `values` are shown beside."""
        note = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step >= self.total or step - self._printed >= self.every:
            if self._printed >= self.total:
                return
            now = time.monotonic()
            if step < self.total and now - self._last < self.pause:
                return
            self._printed, self._last = step, now
            spent = now - self._start
            left = spent / max(step - self._first, 1) * (self.total - step)
            clock = f"{spent:.0f} s, {left:.0f} s left" if step < self.total else f"{spent:.0f} s"
            print("  ".join(p for p in (f"{self.label} {step}/{self.total}", note, clock) if p), file=self.stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

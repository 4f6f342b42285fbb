"""A run directory: everything needed to know what was run, on what, and what came out.

    config.json        the resolved config
    run.json           experiment, run id, and one entry per start: command line, time, git revision
    environment.json   python, jax, versions, device (of the latest start)
    metrics.jsonl      one line per logged step, unbuffered; {"step": 3, "time": 12.1, "loss": 2.5}
    summary.json       final numbers, replaced atomically

The files come first and trackers only mirror them, so nothing that reads a run depends on a tracker.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit import files
from lowbit.errors import InputError
from lowbit.experiment import config as configs
from lowbit.experiment.tracking import Tracker

PACKAGES = ("lowbit", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "gguf", "tokenizers")


class Run:
    """An open run directory (or a named part of one, see `sub`). Use `Run.open`, and as a context manager."""

    def __init__(self, dir: Path, resumed: bool, tracker: Tracker, prefix: str = ""):
        self.dir = dir
        self.resumed = resumed
        self.tracker = tracker
        self.prefix = prefix
        self.metrics_path = dir / "metrics.jsonl"
        self._started = time.monotonic()
        self._subs: dict[str, Run] = {}
        self.dir.mkdir(parents=True, exist_ok=True)
        self._summary: dict[str, Any] = _read_json(dir / "summary.json") if (dir / "summary.json").exists() else {}
        _drop_torn_line(self.metrics_path)
        self._metrics = self._append()

    @classmethod
    def open(
        cls,
        dir: str | Path,
        config: Any = None,
        *,
        resume: bool = False,
        experiment: str = "",
        argv: Sequence[str] | None = None,
        tracking: str | None = None,
        project: str = "lowbit",
        may_differ: Sequence[str] = (),
    ) -> "Run":
        """Creates a run directory, or reopens it with `resume`.

        `config` is a frozen dataclass or a JSON object. `tracking` is online, offline or disabled (default: the
        environment's WANDB_MODE, else disabled). `may_differ` are dotted config keys that a resumed run may change.
        Raises `InputError` when the directory exists and is not empty
        (without `resume`), holds no run or a run with another config (with `resume`), or cannot be written.
        """
        dir = Path(dir)
        data = {} if config is None else config if isinstance(config, dict) else configs.to_json(config)
        if resume:
            info = check_resume(dir, data, may_differ)
        else:
            check_new(dir)
            info = {"experiment": experiment, "id": secrets.token_hex(4), "starts": []}
        # The command first: an unwritable place fails here, before anything else exists.
        command = ["lowbit", *argv] if argv is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]
        start = {"command": shlex.join(command), "time": _now(), "git": git_state(Path.cwd()), "cwd": str(Path.cwd())}
        info["starts"].append(start)
        write_json(dir / "run.json", info)
        write_json(dir / "config.json", data)
        write_json(dir / "environment.json", environment())
        tracker = Tracker.start(
            tracking, dir, project=project, name=dir.name, run_id=info["id"], config=data, resume=resume
        )
        return cls(dir, resume, tracker)

    def sub(self, name: str) -> "Run":
        """A part of this run with its own step count: files under `dir/name`, tracked as `name/...`."""
        if name not in self._subs:
            self._subs[name] = Run(self.dir / name, self.resumed, self.tracker, f"{self.prefix}{name}/")
        return self._subs[name]

    def log(self, step: int, **metrics: Any) -> None:
        """Appends `{"step", "time", **metrics}`; `time` is seconds since this start. Scalars of any array library."""
        values = {k: scalar(v, k) for k, v in metrics.items()}
        line = {"step": int(step), "time": round(time.monotonic() - self._started, 3), **values}
        try:
            self._metrics.write((json.dumps(line) + "\n").encode())
        except OSError as e:
            raise InputError(f"cannot write {self.metrics_path}: {e.strerror}") from e
        self.tracker.log(step, values, self.prefix)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: call it with the step of the checkpoint that training resumes from."""
        kept = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
        self._metrics.close()
        files.write_text(self.metrics_path, "".join(kept))
        self._metrics = self._append()

    def _append(self) -> Any:
        try:
            return open(self.metrics_path, "ab", buffering=0)  # a line is one write: readers never see half of one
        except OSError as e:
            raise InputError(f"cannot write {self.metrics_path}: {e.strerror}") from e

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines."""
        return read_metrics(self.metrics_path)

    def summary(self, **values: Any) -> dict[str, Any]:
        """Merges values into summary.json (atomic) and returns the whole of it."""
        self._summary |= {k: v if isinstance(v, str | list | dict) else scalar(v, k) for k, v in values.items()}
        write_json(self.dir / "summary.json", self._summary)
        self.tracker.summary({k: v for k, v in values.items() if not isinstance(v, list | dict)}, self.prefix)
        return dict(self._summary)

    def path(self, *parts: str) -> Path:
        """A path inside the run directory."""
        return self.dir.joinpath(*parts)

    def close(self, ok: bool = True) -> None:
        """Closes the files and, for the whole run, the tracker. Safe to call twice."""
        for sub in self._subs.values():
            sub.close(ok)
        self._metrics.close()
        if not self.prefix:
            self.tracker.finish(ok)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.close(kind is None)
        if kind is not None and issubclass(kind, InputError) and not self.resumed:
            self._discard_unused()

    def _discard_unused(self) -> None:
        """After bad input ended a new run before it wrote anything: frees the directory for the corrected command."""
        names = {"config.json", "environment.json", "run.json", "metrics.jsonl"}
        files = list(self.dir.iterdir())
        if {f.name for f in files} <= names and not self.metrics_path.stat().st_size:
            for f in files:
                f.unlink()
            self.dir.rmdir()


def check_new(dir: Path) -> None:
    """Raises `InputError` unless a new run may go there."""
    if dir.exists() and not dir.is_dir():
        raise InputError(f"run directory {dir} is a file (allowed: a new or empty directory)")
    if dir.exists() and any(dir.iterdir()):
        raise InputError(f"run directory {dir} is not empty (allowed: a new directory, or --resume to continue it)")


def check_resume(dir: Path, config: Mapping[str, Any], may_differ: Sequence[str] = ()) -> dict[str, Any]:
    """run.json of a run that may be resumed with `config`. Raises `InputError` naming the keys that differ."""
    if not (dir / "run.json").exists() or not (dir / "config.json").exists():
        raise InputError(f"nothing to resume in {dir}: no run.json and config.json (allowed: a run directory)")
    changed = configs.differences(_read_json(dir / "config.json"), dict(config))
    changed = [line for line in changed if line.split(": ")[0] not in may_differ]
    if changed:
        raise InputError(f"cannot resume {dir} with another config: {'; '.join(changed)} (old -> new)")
    return _read_json(dir / "run.json")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line (the writer was killed) is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as e:
        raise InputError(f"{path} is corrupt: {e} (allowed: one JSON object a line)") from e


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole != len(text):
            os.truncate(path, whole)


def scalar(value: Any, name: str) -> float | int | bool | str | None:
    """A Python scalar from a number or a 0-d array; NaN and infinity become strings, which JSON has no number for."""
    if hasattr(value, "item") and getattr(value, "shape", ()) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"metric {name} is {type(value).__name__} (allowed: a scalar)")


def write_json(path: str | Path, data: Any) -> None:
    """Atomic, indented JSON."""
    files.write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__} (allowed: a JSON object)")
    return data


def environment() -> dict[str, Any]:
    """Versions, machine and devices of this process."""
    import jax

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [str(d.device_kind) for d in devices],
        "process_count": jax.process_count(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{"revision", "dirty"}` of the repository around `folder`, or None outside of one or without git."""

    def git(*args: str) -> str:
        out = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=30)
        return out.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

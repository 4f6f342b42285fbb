"""A mirror of the run in wandb. A run never fails, and never waits long, because wandb does.

Off unless asked for: `--tracking online|offline` or WANDB_MODE. Online falls back to offline when the server cannot be
reached; what an offline run recorded is uploaded later by `wandb sync DIR`. Any error of wandb prints one line, and the
run goes on without it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import unknown

MODES = ("online", "offline", "disabled")
INIT_TIMEOUT = 30  # seconds that an unreachable server may hold up the start


class Tracker:
    """Sends metrics to a wandb run, or nowhere."""

    def __init__(self, run: Any = None):
        self._run = run
        self._defined: set[str] = set()

    @classmethod
    def start(
        cls,
        mode: str | None,
        dir: Path,
        *,
        project: str,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        resume: bool = False,
    ) -> "Tracker":
        """Starts (or, with the same `run_id`, continues) a wandb run whose files lie in `dir/wandb`.

        `mode` None means WANDB_MODE, else disabled. WANDB_PROJECT and WANDB_ENTITY are honoured.
        Raises `InputError` for an unknown mode, and nothing else.
        """
        mode = resolve_mode(mode)
        for attempt in {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}[mode]:
            try:
                return cls(_init(attempt, dir, project, name, run_id, config, resume))
            except Exception as e:
                then = "recording offline" if attempt == "online" else "continuing without it"
                _warn(f"wandb {attempt} failed to start ({_brief(e)}); {then}")
        return cls()

    @property
    def active(self) -> bool:
        return self._run is not None

    def log(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Logs `prefix + key`, with `prefix + "step"` as their x axis (each part of a run counts its own steps)."""

        def send(run: Any) -> None:
            axis = prefix + "step"
            for key in {axis, *(prefix + k for k in values)} - self._defined:
                self._defined.add(key)
                run.define_metric(key, hidden=True) if key == axis else run.define_metric(key, step_metric=axis)
            run.log({axis: int(step)} | {prefix + k: v for k, v in values.items()})

        self._try("log", send)

    def summary(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._try("summary", lambda run: run.summary.update({prefix + k: v for k, v in values.items()}))

    def finish(self, ok: bool = True) -> None:
        self._try("finish", lambda run: run.finish(exit_code=0 if ok else 1))
        self._run = None

    def _try(self, what: str, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as e:  # whatever a tracker raises, the run outlives it
            _warn(f"wandb {what} failed ({_brief(e)}); continuing without it")
            self._run = None


def resolve_mode(mode: str | None) -> str:
    """The tracking mode of an option value. Raises `InputError` for a mode that wandb does not have."""
    mode = mode or os.environ.get("WANDB_MODE") or "disabled"
    if mode == "dryrun":  # wandb's old name
        mode = "offline"
    if mode not in MODES:
        raise unknown("tracking mode", mode, MODES)
    return mode


def _init(mode: str, dir: Path, project: str, name: str, run_id: str, config: Mapping[str, Any], resume: bool) -> Any:
    import wandb  # imported late: it takes a second, and most runs do without

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_TIMEOUT, x_disable_stats=True, x_disable_machine_info=True
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or project,
        name=name,
        id=run_id,
        dir=str(dir),
        config=dict(config),
        mode=mode,
        resume="allow" if resume and mode == "online" else None,
        settings=settings,
    )
    where = run.url if mode == "online" else f"{run.settings.sync_dir} (upload: wandb sync DIR)"
    print(f"wandb {mode}: {where}", file=sys.stderr)
    return run


def _brief(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def _warn(line: str) -> None:
    print(f"lowbit: warning: {line}", file=sys.stderr)

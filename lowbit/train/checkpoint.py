"""Checkpoints: the only module that knows orbax.

A checkpoint is three items: `params` and `opt` (flat dicts of arrays) and `meta` (JSON: layout of the parameters,
fingerprint of the configuration, step and metric). Saving is asynchronous and atomic: a crash leaves the old
checkpoints and at most a temporary folder that the next run removes. Arrays are restored onto any mesh.

There is no generator state to save: everything random is a function of the seed and the step.
"""

import dataclasses
import inspect
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from lowbit.errors import InputError
from lowbit.train.params import Flat, Layout, unflatten
from lowbit.tree import Tree

SLACK = 2**20  # bytes beyond the arrays, for metadata
# What orbax and tensorstore raise for full disks, lost permissions and damaged files.
FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Meta:
    """Everything in a checkpoint that is not an array."""

    step: int  # updates done
    layout: Layout
    fingerprint: dict[str, Any]
    arrays: dict[str, Any]  # name -> [shape, dtype] of params
    metric: float | None = None  # lower is better


class Checkpoints:
    """The checkpoints of one run, in `directory`: the `keep` latest and the one with the lowest metric."""

    def __init__(self, directory: str | Path, keep: int = 2):
        _quiet()
        self.directory = Path(directory).absolute()
        best = policies.BestN(
            get_metric_fn=lambda m: m["metric"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "opt", "meta"))
        except OSError as e:
            raise InputError(f"cannot write checkpoints to {self.directory}: {e.strerror or e}") from e

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, params: Flat, opt: Any, meta: Meta) -> None:
        """Starts writing; an earlier write is waited for first. Raises `InputError` when a write fails."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(params)),
            opt=ocp.args.StandardSave(_named(opt)),
            meta=ocp.args.JsonSave(dataclasses.asdict(meta)),
        )
        need = sum(a.nbytes for a in jax.tree.leaves((params, opt)))
        free = shutil.disk_usage(self.directory).free
        if free < need + SLACK:
            raise self._failed(f"{need} bytes needed, {free} free")
        metrics = None if meta.metric is None else {"metric": float(meta.metric)}
        try:
            self._manager.save(meta.step, args=args, metrics=metrics, force=True)
        except FAILURES as e:
            raise self._failed(_line(e)) from e

    def wait(self) -> None:
        """Until everything is on disk. Raises `InputError` when a write failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except FAILURES as e:
            raise self._failed(_line(e)) from e

    def close(self) -> None:
        """Releases the threads."""
        try:
            self._manager.close()
        except FAILURES as e:
            raise self._failed(_line(e)) from e

    def preempted(self, step: int) -> bool:
        """Whether a scheduler told any process of a multi-process run to stop; all processes agree on the step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def meta(self, step: int) -> Meta:
        """The JSON part. Raises `InputError` when it cannot be read."""
        try:
            raw = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            return Meta(**raw)
        except FAILURES as e:
            raise InputError(f"checkpoint {step} in {self.directory} cannot be read: {_line(e)}") from e

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the checkpoint with the lowest metric, None if none has one. Raises `InputError`."""
        scored = [(m.metric, m.step) for m in map(self.meta, self.steps()) if m.metric is not None]
        return min(scored)[::-1] if scored else None

    def restore(self, step: int, params: Mapping[str, Any], opt: Any = None) -> tuple[Flat, Any]:
        """Arrays for templates of `ShapeDtypeStruct`s with shardings; without `opt` only the parameters are read."""
        items = {"params": ocp.args.StandardRestore(dict(params))}
        if opt is not None:
            items["opt"] = ocp.args.StandardRestore(_named(opt))
        try:
            out = self._manager.restore(step, args=ocp.args.Composite(**items))
        except FAILURES as e:
            raise InputError(f"checkpoint {step} in {self.directory} cannot be read: {_line(e)}") from e
        if opt is None:
            return out.params, None
        return out.params, jax.tree.unflatten(jax.tree.structure(opt), [out.opt[n] for n in _named(opt)])

    def _failed(self, why: str) -> InputError:
        try:
            good = self.steps()
        except FAILURES:
            good = []
        last = f"step {good[-1]}" if good else "none"
        return InputError(f"cannot write a checkpoint to {self.directory}: {why} (last good checkpoint: {last})")


def refuse_other_config(saved: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raises `InputError` naming each key in which a run would differ from the one that it resumes."""
    differing = [k for k in sorted(saved.keys() | now.keys()) if saved.get(k) != now.get(k)]
    if differing:
        shown = ", ".join(f"{k} was {saved.get(k)!r} and is {now.get(k)!r}" for k in differing)
        raise InputError(f"cannot resume {directory} with another configuration: {shown}")


def load(directory: str | Path, step: int | None = None, best: bool = False) -> tuple[Tree, Meta]:
    """Parameters of a checkpoint (the latest, or the one with the lowest metric) on the default device.

    Raises `InputError` when there is none or it cannot be read.
    """
    if not Path(directory).is_dir():
        raise InputError(f"no checkpoints in {directory} (it is not a folder)")
    checkpoints = Checkpoints(directory, keep=2**31 - 1)
    try:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise InputError(f"no checkpoint {'' if step is None else step} in {directory} (there are: {steps})")
        if best:
            found = checkpoints.best()
            step = found[0] if found else steps[-1]
        meta = checkpoints.meta(steps[-1] if step is None else step)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = {n: jax.ShapeDtypeStruct(s, d, sharding=device) for n, (s, d) in meta.arrays.items()}
        flat, _ = checkpoints.restore(meta.step, template)
        return unflatten(flat, meta.layout), meta
    finally:
        checkpoints.close()


def describe(params: Flat) -> dict[str, Any]:
    """`{name: [shape, dtype]}`, JSON-able."""
    return {n: [list(a.shape), str(a.dtype)] for n, a in params.items()}


def _quiet() -> None:
    """Orbax logs every save and every failed write with a traceback, leaves the other writes of a failed save unawaited
    (asyncio logs each one), and tensorstore calls back into event loops that a failure has closed. All of them also
    reach us as exceptions, which is where they are reported."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_not_orbax)  # adding it twice changes nothing
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "_lowbit", False):
        return

    def hook(info: Any) -> None:
        closed = isinstance(info.exc_value, RuntimeError) and str(info.exc_value) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(info.object):  # lowbit has no coroutines, orbax leaves some
            before(info)

    hook._lowbit = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _not_orbax(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("orbax" in message or "tensorstore" in message)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves of an optimizer state under unique names, in flattening order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{i:05d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _line(e: BaseException) -> str:
    """What went wrong in a few words; tensorstore wraps an errno in a long status message."""
    code = re.search(r"os_error_code='(\d+)'", str(e))
    return os.strerror(int(code[1])) if code else " ".join((str(e) or type(e).__name__).split())[:300]

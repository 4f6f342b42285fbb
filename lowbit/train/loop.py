"""The training loop: knows optimizers, checkpoints and meshes, but no method and no data format.

A step is a pure function of (state, batch number): `batch(step)` gives the rows, the update count is in the optimizer
state, and nothing else varies. A run that was killed and resumed therefore computes the same bits as one that was not.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lowbit.errors import InputError
from lowbit.train import checkpoint, sharding
from lowbit.train.checkpoint import Checkpoints, Meta
from lowbit.train.config import TrainConfig
from lowbit.train.objective import Objective
from lowbit.train.oscillation import SHARES
from lowbit.train.params import Flat, flatten, unflatten
from lowbit.train.step import Setup, Wrap, abstract, carried, prepare
from lowbit.tree import Tree

Batches = Callable[[int], Mapping[str, Any]]
Record = dict[str, int | float]
REVISED = "revised"  # among the metrics of a step after which there was a revision: its facts


class TrainingDiverged(InputError):
    """A loss, gradient or parameter is no longer finite. No checkpoint was overwritten, nor one of these written."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """From update number `step` (counted from 0) on, what is trained is `change` of what was: another bit width, other
    activation formats. The optimizer keeps the state of every array that keeps its name and shape."""

    step: int
    change: Callable[[Tree], Tree]


class Moment(NamedTuple):
    """What a revision gets to know of the training in whose midst it is."""

    step: int  # updates that were made
    batch: Callable[[int], dict[str, Any]]  # the n-th batch from here on, on the mesh; after the last comes the first
    objective: Objective
    teacher: Tree | None
    settings: TrainConfig


# Other values for parameters, in the same layout, and facts for the next record.
Revise = Callable[[Tree, Moment], tuple[Tree, Record]]


@dataclasses.dataclass(frozen=True)
class Result:
    """Where training ended. `status` is `stopped` after SIGTERM or Ctrl-C; `message` is one line for a person."""

    params: Tree
    step: int
    status: Literal["finished", "stopped"]
    message: str
    history: list[Record]  # what was logged by this process
    whole: tuple[str, ...] = ()  # parameters that the mesh could not split
    best: tuple[int, float] | None = None  # step and evaluation of the best checkpoint


def train(
    params: Tree,
    batch: Batches,
    objective: Objective,
    config: TrainConfig,
    *,
    teacher: Tree | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    on_metrics: Callable[[Record], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    evaluate: Callable[[Tree], float] | None = None,
    on_evaluate: Callable[[int, float], None] | None = None,
    stages: Sequence[Stage] = (),
    wrap: Wrap | None = None,
    revise: Revise | None = None,
) -> Result:
    """Trains `params` for `config.steps` steps on `batch(0), batch(1), ...`.

    Args:
      params: tree with arrays, `Latent`s and `Coded`s; floating-point leaves become float32 masters. Packed weights and
        the codes of a `Coded` stay frozen.
      batch: arrays `[batch_size, ...]` of a step; must depend on nothing but the step.
      objective: see `lowbit.train.objective`.
      teacher: frozen parameters that the objective gets as its second argument.
      directory: of the checkpoints; None keeps nothing.
      resume: continue from the latest checkpoint in `directory`, if there is one.
      fingerprint: more JSON-able facts (model, data, plan) that a resumed run must share.
      on_metrics: gets `step, loss, lr, grad_norm, tokens, tokens_per_second` every `log_every` steps and at the end;
        `step` counts finished updates, `loss` is the mean in nats per token of that step.
      on_resume: gets the step from which training continues, so that later records can be dropped.
      evaluate: a number to minimise, computed at each save; the best checkpoint is kept too.
      on_evaluate: gets the step and that number.
      stages: changes of `params` on the way, in order.
      wrap: puts another optimizer around the one that `config` names, given the formats of the latents by name.
      revise: changes what steps leave alone, codes say, every `config.revise_every` steps but for the last; what it
        finds worth telling goes into the next record.

    Raises:
      TrainingDiverged: on a loss, gradient norm or parameter that is not finite, before it could be saved.
      InputError: on anything that cannot be: a full disk, another configuration, a mesh that does not fit.
    """
    _check_stages(stages, config)
    if revise is not None:
        config.check_revisions()
    identity = config.fingerprint() | dict(fingerprint or {})
    history: list[Record] = []
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if directory is not None:
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory, config.keep)))
        start = _latest(checkpoints, resume)
        ahead = list(stages)
        while ahead and ahead[0].step < start:
            params = ahead.pop(0).change(params)
        setup = prepare(params, objective, config, teacher, wrap)
        learned, frozen = setup.learned, setup.frozen
        if checkpoints is not None and start:
            learned, frozen, opt = _resume(checkpoints, start, setup, identity)
        else:
            opt = setup.init(learned)
        if on_resume is not None:
            on_resume(start)

        def save(step: int) -> None:
            """Keeps the parameters after `step` updates, once they have given a finite loss themselves: the loss of
            that step was of those before the update."""
            if checkpoints is None or step in checkpoints.steps():
                return
            loss = float(setup.probe(learned, frozen, setup.teacher, rows))
            if not math.isfinite(loss):
                raise TrainingDiverged(_diverged(step, f"loss after the update is {loss:g}", checkpoints))
            everything = learned | frozen
            metric = None if evaluate is None else float(evaluate(unflatten(everything, setup.layout)))
            if metric is not None and not math.isfinite(metric):
                raise TrainingDiverged(_diverged(step, f"evaluation is {metric:g}", checkpoints))
            if metric is not None and on_evaluate is not None:
                on_evaluate(step, metric)
            arrays = checkpoint.describe(everything)
            checkpoints.save(everything, opt, Meta(step, setup.layout, identity, arrays, metric))

        def log(step: int, metrics: dict[str, Any], clock: _Clock) -> None:
            """Waits for step number `step`, stops on what is not finite, and reports every `log_every`."""
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            clock.tokens += (tokens := int(metrics["tokens"]))
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise TrainingDiverged(_diverged(step, f"{name} is {value:g}", checkpoints))
            if not bool(metrics["finite"]):
                raise TrainingDiverged(_diverged(step, "the update gave parameters that are not finite", checkpoints))
            if step % config.log_every == 0 or step in (1, config.steps) or REVISED in metrics:
                record = {"step": step, "loss": loss, "lr": float(metrics["lr"]), "grad_norm": norm}
                record |= {k: float(metrics[k]) for k in SHARES if k in metrics} | metrics.get(REVISED, {})
                history.append(record | {"tokens": tokens, "tokens_per_second": clock.rate()})
                if on_metrics is not None:
                    on_metrics(history[-1])

        def placed(step: int, further: int) -> dict[str, Any]:
            """The rows of a step, or of one so many further on."""
            n = (step + further) % config.steps
            return sharding.place_batch(_checked(batch(n), config, n), setup.sharding.mesh)

        # What revisions get, which see trees.
        goal = None if teacher is None else unflatten(setup.teacher, flatten(teacher)[1])
        stop = stack.enter_context(stop_signals())
        step, waiting, clock = start, None, _Clock()
        while step < config.steps and not stop.is_set():
            if ahead and ahead[0].step == step:
                changed = ahead.pop(0).change(unflatten(learned | frozen, setup.layout))
                setup = prepare(changed, objective, config, teacher, wrap)
                learned, frozen = setup.learned, setup.frozen
                opt = carried(opt, setup.init(learned))
            rows = placed(step, 0)
            advance = setup.warm if step < config.quant_warmup else setup.step
            learned, opt, metrics = advance(learned, opt, frozen, setup.teacher, rows)
            step += 1
            if revise is not None and step % config.revise_every == 0 and step < config.steps:
                now = Moment(step, partial(placed, step), objective, goal, config)
                learned, frozen, facts = _revised(revise, now, learned, frozen, setup)
                metrics = {**metrics, REVISED: facts}
            if waiting is not None:  # one step late, so that the device is never idle
                log(*waiting, clock)
            waiting = (step, metrics)
            if config.save_every and step % config.save_every == 0:
                log(*waiting, clock)  # never save what has diverged
                waiting = None
                save(step)
            if checkpoints is not None and checkpoints.preempted(step):
                stop.set()
        if waiting is not None:
            log(*waiting, clock)
        if step > start:
            save(step)
        best = None
        if checkpoints is not None:
            checkpoints.wait()
            best = checkpoints.best()
        stopped = step < config.steps
    final = unflatten(learned | frozen, setup.layout)
    kept = f"saved in {checkpoints.directory}, continue with --resume" if checkpoints else "nothing was saved"
    message = f"stopped after step {step} of {config.steps}: {kept}" if stopped else f"finished {step} steps"
    return Result(final, step, "stopped" if stopped else "finished", message, history, setup.sharding.whole, best)


def _check_stages(stages: Sequence[Stage], config: TrainConfig) -> None:
    steps = [s.step for s in stages]
    if steps != sorted(set(steps)) or any(not 0 < s < config.steps for s in steps):
        raise InputError(f"stages at steps {steps} (allowed: rising, from 1 to {config.steps - 1})")


def _latest(checkpoints: Checkpoints | None, resume: bool) -> int:
    steps = checkpoints.steps() if checkpoints else []
    if checkpoints and steps and not resume:
        here = f"{checkpoints.directory} has checkpoints up to step {steps[-1]}"
        raise InputError(f"{here} (allowed: --resume to continue, or another folder)")
    return steps[-1] if steps else 0


def _revised(revise: Revise, now: Moment, learned: Flat, frozen: Flat, setup: Setup) -> tuple[Flat, Flat, Record]:
    """Both after `revise`, where they were, and its facts."""
    changed, facts = revise(unflatten(learned | frozen, setup.layout), now)
    flat, layout = flatten(changed)
    if layout != setup.layout:
        raise InputError("a revision that changes the layout of the parameters (allowed: other values)")
    flat = {n: jax.device_put(a, setup.sharding.of(n)) for n, a in flat.items()}
    return {n: flat[n] for n in learned}, {n: flat[n] for n in frozen}, facts


def _resume(checkpoints: Checkpoints, step: int, setup: Setup, identity: Mapping[str, Any]) -> tuple[Flat, Flat, Any]:
    meta = checkpoints.meta(step)
    checkpoint.refuse_other_config(meta.fingerprint, identity, checkpoints.directory)
    if meta.layout != setup.layout:
        differing = [p for p in meta.layout.keys() | setup.layout if meta.layout.get(p) != setup.layout.get(p)]
        raise InputError(f"cannot resume {checkpoints.directory}: {sorted(differing)[0]} has another format")
    everything = setup.learned | setup.frozen
    like = abstract(everything, {n: setup.sharding.of(n) for n in everything})
    opt = abstract(setup.opt_shape, setup.opt_sharding)
    params, opt = checkpoints.restore(step, like, opt)
    return {n: params[n] for n in setup.learned}, {n: params[n] for n in setup.frozen}, opt


def _checked(batch: Mapping[str, Any], config: TrainConfig, step: int) -> Mapping[str, Any]:
    for name, a in batch.items():
        if np.shape(a)[:1] != (config.batch_size,):
            raise InputError(f"batch {step}: {name} is {list(np.shape(a))} (allowed: {config.batch_size} rows)")
    return batch


def _diverged(step: int, what: str, checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return f"training diverged: {what} at step {step} (there are no checkpoints)"
    checkpoints.wait()
    steps = checkpoints.steps()
    good = f"step {steps[-1]} in {checkpoints.directory}" if steps else "none"
    return f"training diverged: {what} at step {step} (last good checkpoint: {good})"


class _Clock:
    """Tokens per second since it was last asked; compilation counts for the first reading."""

    def __init__(self) -> None:
        self.tokens, self.start = 0, time.perf_counter()

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9)
        self.tokens, self.start = 0, now
        return rate


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C interrupts at once.

    Nothing is installed outside the main thread, nor in a run of several processes, where jax's own handler lets all
    of them agree on the last step.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        for s in before:
            signal.signal(s, handle)
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

"""Block-AP (EfficientQAT, arXiv 2407.11062, section 3.2): each block learns to give what it gave unquantized.

Two streams of activations go through the decoder. The float stream gives the labels, `y = block(x_float)`; the student
gets what comes through the blocks that are quantized already, `x_quantized`, and minimises

    mean (block_quantized(x_quantized) - y)^2

in all its weights, scales and zero points, by Adam with one rate for weights and one for the rest, on a cosine. After
each epoch the error on rows that are not trained on decides: the best epoch is kept (rounding to nearest counts as
one), and a block without progress is done.

Memory: float32 weights, gradients and two moments of *one* block, on the host two streams of
`rows * length * hidden * 4` bytes, the packed blocks, and the float model only where the caller holds it (`read`). One
program is compiled for all blocks of one shape. A block that is done lies on disk, packed, before the next one starts.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit import xla
from lowbit.errors import InputError, Stopped
from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import block
from lowbit.models.model import Model
from lowbit.plan import encoded_bytes
from lowbit.ptq import rtn
from lowbit.ptq.calibrate import Readers, Stream, readers_of, working
from lowbit.ptq.folder import block_facts, stored_block, write_block
from lowbit.qat.latents import Stored, convert, learned, prepare
from lowbit.train.block_options import BlockOptions
from lowbit.train.loop import stop_signals
from lowbit.tree import Tree

ADAM = optax.scale_by_adam(0.9, 0.999, 1e-8)
# What learns, by path inside of the layer: a latent with its parameters, those of a `Coded`, or an array as it is.
Latents = dict[str, Latent | dict[str, Any] | Array]
# `start(params, assignment, stored=...)`: a layer in training.
Start = Callable[..., Tree]


def latent(params: Tree, assignment: Mapping[str, Any], *, stored: Stored | None = None) -> Tree:
    """Block-AP's start: weights, scales and zero points learn."""
    return prepare(params, assignment, learned, stored)


class Trained(NamedTuple):
    """A block's best latents and how it came to them; errors are means over the elements of the block's output."""

    latents: Latents
    start: float  # validation error of rounding to nearest
    best: int  # epoch that was kept, from 1; 0: rounding to nearest
    valid: list[float]  # validation error after each epoch
    train: list[float]  # mean error over the steps of each epoch


def block_ap(
    model: Model,
    assignment: Mapping[str, Any],
    tokens_BT: Int[np.ndarray, "B T"],
    options: BlockOptions | None = None,
    directory: str | Path | None = None,
    on_block: Callable[[dict[str, Any], int], None] | None = None,
    stored: Stored | None = None,
    read: Readers | None = None,
    teacher: Model | None = None,
    start: Start = latent,
) -> Tree:
    """The model's parameters with the sites of `assignment` (see `Plan.resolve`) packed after Block-AP.

    The first `options.rows` rows of `tokens_BT` are trained on, the next `options.valid_rows` validate. Weights outside
    of the layers are rounded to nearest; norms, biases and kept linears stay as they are. Activation and cache formats
    act on the student while it learns. With a `directory`, each finished block is kept there, and the same call (model,
    assignment, tokens and options) goes on behind the last one, to the same bits; another one starts anew.
    `read` gives the model's leaves one at a time (see `lowbit.models.hf.readers`); `model.params` may then be abstract,
    and no more than one block of the float model is in memory. `on_block(report, blocks)` gets of each layer, also of
    one that an earlier call finished: `block`, `weights`, `start_mse`, `valid_mse`, `train_mse` (of the epoch that was
    kept), `best_epoch`, `epochs`, `seconds` and `seconds_per_million_weights`.

    `teacher`, of the same shapes, gives the labels (default: the model itself). With a `start` that gives `Coded`s
    (`lowbit.qat.finetune`) what is continuous in them learns, and the layer's norms with it.

    Raises `InputError` for too few rows, sites that do not exist, cannot be trained or are quantized already, and when
    an error is not finite; `Stopped` after SIGTERM or Ctrl-C.
    """
    o, c, params = options or BlockOptions(), model.config, model.params
    if len(tokens_BT) < o.rows + o.valid_rows:
        raise InputError(
            f"Block-AP has {len(tokens_BT)} rows of tokens (needed: {o.rows} to train and {o.valid_rows} to validate)"
        )
    tokens_BT = np.asarray(tokens_BT[: o.rows + o.valid_rows], np.int32)
    read = readers_of(params) if read is None else read
    inside = {i: [p for p in read if p.startswith(f"model.layers.{i}.")] for i in range(c.num_layers)}
    sites = {i: {s: f for s, f in assignment.items() if s.startswith(f"model.layers.{i}.")} for i in inside}
    outside = {s: f for s, f in assignment.items() if not any(s in own for own in sites.values())}
    rtn.check_paths(params, outside)
    within = {s: f for own in sites.values() for s, f in own.items()}
    jax.eval_shape(lambda p: start(p, within, stored=stored), params)  # refuses what cannot be, computes nothing
    if teacher is not None and teacher.config != c:
        raise InputError(f"teacher {teacher.source} of another shape than {model.source} (allowed: the same)")
    labels = read if teacher is None else readers_of(teacher.params)
    layers = {p for own in inside.values() for p in own}
    out = {p: rtn.quantize_leaf(p, _array(leaf()), outside, stored) for p, leaf in read.items() if p not in layers}
    float_stream, stream = Stream(c, tokens_BT), Stream(c, tokens_BT)
    embed = "model.embed_tokens"
    key = _first_key(c, tokens_BT, assignment, o, start, {embed: read[embed](), **(stored or {})})
    if teacher is not None:
        key += teacher.fingerprint()
    done = [_Stored(None if directory is None else Path(directory) / f"{i:05}") for i in range(c.num_layers)]
    at = None  # the block whose inputs the streams hold; what is done already is passed only if something follows

    def advance(to: int) -> None:
        nonlocal at
        if at is None:
            float_stream.start(labels[embed]())
            stream.start(out[embed])
            at = 0
        for j in range(at, to):
            float_stream.advance(working(_layer(j, {p: _array(labels[p]()) for p in inside[j]})), j)
            stream.advance(working(_layer(j, out)), j)
        at = to

    with stop_signals() as stop:
        for i, paths in inside.items():
            leaves = {p: _array(read[p]()) for p in paths}
            key = _next_key(key, leaves)
            if (report := done[i].report(key)) is None:
                advance(i)
                goal = leaves if teacher is None else {p: _array(labels[p]()) for p in paths}
                student = start(trees.build(leaves), sites[i], stored=stored)
                solved = _solve(c, i, leaves, student, goal, stream, float_stream, o, stop.is_set)
                del goal, student
                if solved is None:
                    where = "nothing was saved" if directory is None else f"those before are saved in {directory}"
                    raise Stopped(f"stopped in block {i + 1} of {c.num_layers}: {where}, continue with --resume")
                new, report = solved
                done[i].write(c, new, key, report)
                if i + 1 < c.num_layers:
                    stream.advance(working(_layer(i, new)), i)
                at = i + 1
                out |= new
            else:
                out |= done[i].leaves(c)
            del leaves  # before the next block is read
            xla.release()
            if on_block is not None:
                on_block(report, c.num_layers)
    return trees.build({p: out[p] for p in (*read, *(p for p in out if p not in read))})  # in the model's order


def _solve(
    config: ModelConfig,
    index: int,
    leaves: Mapping[str, Any],
    student: Tree,
    goal: Mapping[str, Any],
    stream: Stream,
    float_stream: Stream,
    options: BlockOptions,
    stop: Callable[[], bool],
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A layer's parameters after training `student` and its report. Takes the float stream through `goal`."""
    begin = time.monotonic()
    student = _layer(index, dict(trees.items(student)))
    float_stream.advance(working(_layer(index, goal)), index)
    trained = train_block(config, student, stream, float_stream, index, options, stop)
    if trained is None:
        return None
    packed = dict(trees.items(convert(_merge(trained.latents, _split(student)[1]))))
    new = {f"model.layers.{index}.{p}": a for p, a in packed.items()}
    new = {p: _as_it_came(a, leaves.get(p)) for p, a in new.items()}
    weights = sum(math.prod(q.shape) for q in map(unprepared, packed.values()) if isinstance(q, QTensor))
    return new, _report(index, trained, weights, time.monotonic() - begin)


def train_block(
    config: ModelConfig,
    student: Tree,
    stream: Stream,
    labels: Stream,
    index: int,
    options: BlockOptions,
    stop: Callable[[], bool] = lambda: False,
) -> Trained | None:
    """Trains the `Latent`s and `Coded`s of one layer on the rows of `stream`, whose targets are those of `labels`; None
    when `stop` says so in between. Raises `InputError` when an error is not finite."""
    o = options
    latents, rest = _split(student)
    valid_rows = [range(r, r + o.batch) for r in range(o.rows, o.rows + o.valid_rows, o.batch)]

    def error(latents: Latents) -> float:
        pairs = ((stream.take(rows), labels.take(rows)) for rows in valid_rows)
        return float(np.mean([float(_mse(config, latents, rest, x, y, index)) for x, y in pairs]))

    start = _finite(error(latents), index, "before training")
    best = Trained(latents, start, 0, [], [])
    if not latents:
        return best
    rates = _rates(latents, o)
    latents, state = _start(latents)
    total, step, stale = o.epochs * (o.rows // o.batch), 0, 0
    for epoch in range(1, o.epochs + 1):
        losses = []
        order = np.random.default_rng([o.seed, index, epoch]).permutation(o.rows).reshape(-1, o.batch)
        for rows in order.tolist():
            if stop():
                return None
            factor = np.float32(o.lr_end + (1 - o.lr_end) * 0.5 * (1 + math.cos(math.pi * step / total)))
            latents, state, loss = _step(
                config, latents, state, rest, stream.take(rows), labels.take(rows), index, rates, factor
            )
            losses.append(loss)
            step += 1
        best.train.append(_finite(float(np.mean(np.asarray(losses, np.float64))), index, f"in epoch {epoch}"))
        best.valid.append(_finite(error(latents), index, f"after epoch {epoch}"))
        if best.valid[-1] < min([start, *best.valid[:-1]]):
            best, stale = best._replace(latents=_copy(latents), best=epoch), 0
        elif (stale := stale + 1) == o.patience:
            break
    return best


def step_memory(
    config: ModelConfig,
    layer: Tree,
    assignment: Mapping[str, Any],
    options: BlockOptions,
    length: int,
    start: Start = latent,
) -> dict[str, int]:
    """Bytes of training one layer (its arrays may be abstract, its paths and those of `assignment` full ones), from
    compiling its step: `params`, `optimizer`, all `arguments` of the step, its `temporaries`, and the two `streams`."""

    def begin() -> Any:
        full = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), layer)
        index = int(next(iter(full["model"]["layers"])))
        latents, rest = _split(_layer(index, dict(trees.items(start(full, assignment)))))
        return latents, ADAM.init(latents), rest

    latents, state, rest = jax.eval_shape(begin)
    x = jax.ShapeDtypeStruct((options.batch, length, config.hidden_size), jnp.float32)
    plan = (
        _step.lower(config, latents, state, rest, x, x, 0, _rates(latents, options), np.float32(1))
        .compile()
        .memory_analysis()
    )
    streams = 2 * 4 * (options.rows + options.valid_rows) * length * config.hidden_size
    return {
        "params": _nbytes((latents, rest)),
        "optimizer": _nbytes(state),
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "streams": streams,
    }


def _array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


# -- a layer as what learns and the rest ------------------------------------------------------------------------------


def _layer(index: int, leaves: Mapping[str, Any]) -> Tree:
    prefix = f"model.layers.{index}."
    return trees.build({p.removeprefix(prefix): a for p, a in leaves.items() if p.startswith(prefix)})


def unprepared(leaf: Any) -> Any:
    return leaf.w if isinstance(leaf, PreparedInput) else leaf


def _split(layer: Tree) -> tuple[Latents, dict[str, Any]]:
    """What learns of a layer, and all else in float32."""
    latents: Latents = {}
    rest: dict[str, Any] = {}
    coded = False
    for path, leaf in trees.items(layer):
        w = unprepared(leaf)
        if isinstance(w, Latent):
            latents[path] = w
            if w is not leaf:
                rest[path] = PreparedInput(None, leaf.act, leaf.op, leaf.params)
        elif isinstance(w, Coded):
            latents[path], coded = w.params, True
            rest[path] = rtn.with_weight(leaf, dataclasses.replace(w, params={}))
        else:
            rest |= dict(trees.items(working(trees.build({path: leaf}))))
    if coded:
        latents |= {p: rest.pop(p) for p in list(rest) if p.endswith("norm")}
    return latents, rest


def _merge(latents: Latents, rest: Mapping[str, Any]) -> Tree:
    flat = dict(rest)
    for path, w in latents.items():
        leaf = rest.get(path)
        if isinstance(w, dict):
            w = dataclasses.replace(unprepared(leaf), params=w)
        flat[path] = rtn.with_weight(leaf, w)
    return trees.build(flat)


def _as_it_came(leaf: Any, source: Any) -> Any:
    """What is not quantized, in the type that it had before it was made float32."""
    if isinstance(leaf, PreparedInput) and isinstance(source, PreparedInput):
        return rtn.with_weight(leaf, _as_it_came(leaf.w, source.w))
    if isinstance(leaf, PreparedInput):
        return rtn.with_weight(leaf, _as_it_came(leaf.w, source))
    return leaf.astype(source.dtype) if isinstance(leaf, jax.Array) else leaf


def _rates(latents: Latents, options: BlockOptions) -> Latents:
    """Peak learning rates in the places of the arrays."""

    def weight(latent: Latent) -> float:
        if options.weight_lr is not None:
            return options.weight_lr
        shape = tuple(latent.w.shape)
        return 2e-5 if 8 * encoded_bytes(latent.format, shape) < 3 * math.prod(shape) else 1e-5

    def one(learned: Any) -> Any:
        rates = jax.tree.map(lambda _: np.float32(options.quant_lr), learned)
        return dataclasses.replace(rates, w=np.float32(weight(learned))) if isinstance(learned, Latent) else rates

    return {p: one(a) for p, a in latents.items()}


def _error(config: ModelConfig, latents: Latents, rest: Mapping[str, Any], x: Array, y: Array, index: Any) -> Array:
    out, _ = block(config, _merge(latents, rest), x, jnp.asarray(index, jnp.int32))
    return jnp.mean(jnp.square(out - y))


@partial(jax.jit, static_argnames="config")
def _mse(config: ModelConfig, latents: Latents, rest: Any, x: Array, y: Array, index: Any) -> Float[Array, ""]:
    return _error(config, latents, rest, x, y, index)


@jax.jit
def _start(latents: Latents) -> tuple[Latents, Any]:
    """Latents whose arrays nobody else holds, as a step donates them, and the optimizer's state."""
    return jax.tree.map(jnp.copy, latents), ADAM.init(latents)


@jax.jit
def _copy(latents: Latents) -> Latents:
    return jax.tree.map(jnp.copy, latents)


@partial(jax.jit, static_argnames="config", donate_argnums=(1, 2))
def _step(
    config: ModelConfig,
    latents: Latents,
    state: Any,
    rest: Any,
    x: Array,
    y: Array,
    index: Any,
    rates: Latents,
    factor: Any,
) -> tuple[Latents, Any, Array]:
    loss, grads = jax.value_and_grad(lambda latents: _error(config, latents, rest, x, y, index))(latents)
    updates, state = ADAM.update(grads, state)
    return jax.tree.map(lambda p, u, r: p - factor * r * u, latents, updates, rates), state, loss


def _finite(value: float, index: int, when: str) -> float:
    if not math.isfinite(value):
        raise InputError(
            f"Block-AP: mean squared error {value} {when} of block {index} (allowed: finite; smaller rates may do)"
        )
    return value


def _nbytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# -- what is kept -----------------------------------------------------------------------------------------------------


def _report(index: int, t: Trained, weights: int, seconds: float) -> dict[str, Any]:
    kept = t.best - 1
    return {
        "block": index,
        "weights": weights,
        "start_mse": t.start,
        "valid_mse": t.valid[kept] if t.best else t.start,
        "train_mse": t.train[kept] if t.best else None,
        "best_epoch": t.best,
        "epochs": len(t.valid),
        "seconds": round(seconds, 3),
        "seconds_per_million_weights": round(seconds / (weights / 1e6), 3) if weights else None,
    }


class _Stored(NamedTuple):
    """Where a finished block lies; None keeps nothing."""

    folder: Path | None

    def report(self, key: str) -> dict[str, Any] | None:
        """Of a block that was finished with this key."""
        if self.folder is None or not self.folder.is_dir():
            return None
        facts = block_facts(self.folder)
        return facts["report"] if facts.get("key") == key else None

    def leaves(self, config: ModelConfig) -> dict[str, Any]:
        assert self.folder is not None
        read = {path: read() for path, read in stored_block(self.folder, config).items()}
        return {path: _array(a) for path, a in read.items()}

    def write(self, config: ModelConfig, leaves: Mapping[str, Any], key: str, report: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)  # of another key
        except OSError as e:
            raise InputError(f"cannot write {self.folder}: {e.strerror or e}") from e
        write_block(self.folder, config, leaves.items(), key=key, report=dict(report))


def _first_key(
    config: ModelConfig,
    tokens_BT: np.ndarray,
    assignment: Mapping[str, Any],
    options: BlockOptions,
    start: Start,
    arrays: Mapping[str, Any],
) -> str:
    plan = json.dumps({site: fmt.name for site, fmt in assignment.items()}, sort_keys=True)
    facts = f"{config} {plan} {options} {start.__name__} {tokens_BT.shape} "
    h = hashlib.sha256(facts.encode() + tokens_BT.tobytes())
    return _next_key(h.hexdigest(), arrays)


def _next_key(key: str, leaves: Mapping[str, Any]) -> str:
    """A block's result depends on all that came before it and on its own weights."""
    h = hashlib.sha256(key.encode())
    for path, leaf in leaves.items():
        arrays, kind = jax.tree.flatten(leaf)
        h.update(f"{path} {kind} ".encode())
        for a in arrays:
            h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()

"""One training step: split parameters into learned and frozen, accumulate gradients, update."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.base import Format
from lowbit.train import optimizer, oscillation, sharding
from lowbit.train.config import TrainConfig
from lowbit.train.objective import Objective
from lowbit.train.params import Flat, Layout, flatten, mixed, trainable, unflatten
from lowbit.train.sharding import Sharding
from lowbit.tree import Tree


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a run needs before its first step; arrays may be abstract."""

    learned: Flat
    frozen: Flat
    teacher: Flat
    layout: Layout
    sharding: Sharding
    opt_shape: Any
    opt_sharding: Any
    init: Callable[[Flat], Any]  # optimizer state, jitted
    step: Callable[..., tuple[Flat, Any, dict[str, Array]]]  # jitted, donates learned and optimizer state
    warm: Callable[..., tuple[Flat, Any, dict[str, Array]]]  # the same while quantization is mixed in (`quant_warmup`)
    probe: Callable[[Flat, Flat, Flat, dict[str, Array]], Array]  # mean loss of parameters on a batch, jitted


# (optimizer, {name of a latent: its format}, steps) -> an optimizer around it
Wrap = Callable[[optax.GradientTransformation, Mapping[str, Format], int], optax.GradientTransformation]


def prepare(
    params: Tree, objective: Objective, config: TrainConfig, teacher: Tree | None = None, wrap: Wrap | None = None
) -> Setup:
    """Splits parameters into learned and frozen, places them on the mesh and builds the step."""
    goal, goal_layout = flatten(teacher) if teacher is not None else ({}, {})
    setup = build(*flatten(params), goal, goal_layout, objective, config, wrap)
    # Copies, because a step donates what it gets and the caller keeps `params`.
    learned = {n: jnp.array(a, jnp.float32, copy=True) for n, a in setup.learned.items()}
    goal = sharding.place(goal, sharding.shard(goal, setup.sharding.mesh))
    return dataclasses.replace(
        setup,
        learned=sharding.place(learned, setup.sharding),
        frozen=sharding.place(setup.frozen, setup.sharding),
        teacher=goal,
    )


def build(
    flat: Flat,
    layout: Layout,
    goal: Flat,
    goal_layout: Layout,
    objective: Objective,
    config: TrainConfig,
    wrap: Wrap | None = None,
) -> Setup:
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.microbatches, mesh)
    names = trainable(layout)
    scale = optimizer.factors([n for n in flat if n in names], config)
    learned = {n: a for n, a in flat.items() if scale.get(n, 0.0) > 0}
    if not learned:
        raise InputError("nothing to train (every parameter is packed or has a learning rate of 0)")
    frozen = {n: a for n, a in flat.items() if n not in learned}
    where = sharding.shard(flat, mesh)
    masters = {n: jax.ShapeDtypeStruct(a.shape, jnp.float32) for n, a in learned.items()}
    tx = optimizer.build(config, masters, {n: scale[n] for n in learned})
    formats = {n: base.get(e["format"]) for n, e in layout.items() if e["kind"] == "latent" and n in learned}
    if wrap is not None and config.freeze_above:
        raise InputError("freeze_above with a recipe that keeps its own latents (allowed: 0)")
    latents = {n: e for n, e in layout.items() if e["kind"] == "latent"}
    if wrap is not None:
        own = [m for n, e in latents.items() for m in (n, *(f"{n}:{k}" for k in e["arrays"])) if m not in learned]
        if own:
            raise InputError(f"{own[0]} is frozen, in a recipe whose optimizer takes it to the grid (allowed: none)")
    if config.track_codes or config.freeze_above:
        if not latents:
            raise InputError("track_codes or freeze_above without latent weights (allowed: recipes that train them)")
        oscillation.check(formats, learned, {n: e["arrays"] for n, e in latents.items()}, config.freeze_above > 0)
    if config.quant_warmup and not any("input" in e for e in layout.values()):
        if all(e.get("soft") for e in latents.values()):
            raise InputError("quant_warmup without anything that it warms up (allowed: latent weights, inputs)")
    if wrap is not None:
        tx = wrap(tx, formats, config.steps)
    if config.track_codes or config.freeze_above:
        tx = oscillation.track(tx, formats, config.freeze_momentum, config.freeze_above)

    def init(learned: Flat) -> Any:
        return {"step": jnp.zeros((), jnp.int32), "optax": tx.init(learned)}

    opt_shape = jax.eval_shape(init, masters)
    opt_where = sharding.like(opt_shape, where)

    def totals(frozen: Flat, goal: Flat, mix: Any = None) -> Callable[[Flat, dict[str, Array]], tuple[Array, Array]]:
        teacher = unflatten(goal, goal_layout) if goal else None

        def total(learned: Flat, part: dict[str, Array]) -> tuple[Array, Array]:
            student = unflatten(learned | frozen, layout)
            return objective(student if mix is None else mixed(student, mix), teacher, part)

        return total

    def step(learned: Flat, opt: Any, frozen: Flat, goal: Flat, batch: dict[str, Array], warm: bool = False) -> Any:
        mix = jnp.minimum(opt["step"] / config.quant_warmup, 1.0) if warm else None
        loss, tokens, grads = accumulate(totals(frozen, goal, mix), learned, batch, config.microbatches, mesh)
        lr = optimizer.schedule(config)(opt["step"])
        updates, state = tx.update(grads, opt["optax"], learned)
        learned = _settled(optax.apply_updates(learned, updates), state)
        finite = jnp.stack([jnp.isfinite(a).all() for a in learned.values()]).all()
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": tokens, "lr": lr, "finite": finite}
        metrics |= oscillation.shares(state)
        return learned, {"step": opt["step"] + 1, "optax": state}, metrics

    def probe(learned: Flat, frozen: Flat, goal: Flat, batch: dict[str, Array]) -> Array:
        total = totals(frozen, goal)
        parts = split(batch, config.microbatches, mesh)
        loss, tokens = jax.lax.map(lambda part: total(learned, part), parts)
        return loss.sum() / jnp.maximum(tokens.sum(), 1.0)

    outs = ({n: where.of(n) for n in learned}, opt_where, NamedSharding(mesh, PartitionSpec()))
    jitted, warm = (jax.jit(partial(step, warm=w), donate_argnums=(0, 1), out_shardings=outs) for w in (False, True))
    start = jax.jit(init, out_shardings=opt_where)
    return Setup(learned, frozen, goal, layout, where, opt_shape, opt_where, start, jitted, warm, jax.jit(probe))


def _settled(learned: Flat, state: Any) -> Flat:
    """Parameters with what a wrapping optimizer says that they are (its state's `shown`), which adding an update misses
    by the last bit."""
    found = [s.shown for s in jax.tree.leaves(state, is_leaf=_shows) if _shows(s)]
    return learned | found[0] if found else learned


def _shows(x: Any) -> bool:
    return hasattr(x, "shown")


def accumulate(
    total: Callable[[Flat, dict[str, Array]], tuple[Array, Array]],
    learned: Flat,
    batch: dict[str, Array],
    microbatches: int,
    mesh: Mesh,
) -> tuple[Array, Array, Flat]:
    """`(mean loss, tokens, gradient of the mean)`, microbatch after microbatch.

    Sums are accumulated and divided once, so the result is the mean over all tokens of the batch however they fall.
    """
    grad = jax.value_and_grad(total, has_aux=True)
    if microbatches == 1:
        (loss, tokens), grads = grad(learned, batch)
    else:
        parts = split(batch, microbatches, mesh)

        def add(carry: Any, part: dict[str, Array]) -> tuple[Any, None]:
            (loss, tokens), grads = grad(learned, part)
            return jax.tree.map(jnp.add, carry, (loss, tokens, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned))
        (loss, tokens, grads), _ = jax.lax.scan(add, zero, parts)
    n = jnp.maximum(tokens, 1.0)
    return loss / n, tokens, jax.tree.map(lambda g: g / n, grads)


def split(batch: dict[str, Array], microbatches: int, mesh: Mesh) -> dict[str, Array]:
    """Arrays `[B, ...]` as `[microbatches, B / microbatches, ...]`.

    Row b * m + i goes to microbatch i, so that each device keeps its own rows.
    """
    spec = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    parts = {n: rearrange(a, "(b m) ... -> m b ...", m=microbatches) for n, a in batch.items()}
    return jax.lax.with_sharding_constraint(parts, spec)


def carried(old: Any, new: Any) -> Any:
    """The optimizer state `new` with what `old` has of it: leaves at the same place and of the same shape. Codes that
    were tracked are those of another format: they start anew."""
    have = {jax.tree_util.keystr(k): a for k, a in jax.tree_util.tree_leaves_with_path(old)}

    def one(path: Any, leaf: Array) -> Array:
        place = jax.tree_util.keystr(path)
        before = None if ".tracks[" in place else have.get(place)
        return leaf if before is None or before.shape != leaf.shape else before

    return jax.tree_util.tree_map_with_path(one, new)


def abstract(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s with shardings for arrays (or other `ShapeDtypeStruct`s)."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

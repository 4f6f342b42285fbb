"""Optax optimizers over named parameters: schedules, learning rates by group, decay masks, clipping."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowbit.errors import InputError, unknown
from lowbit.formats.adapter import ARRAYS
from lowbit.train.config import OPTIMIZERS, SCHEDULES, TrainConfig

FACTORS = tuple(f":{k}" for k in ARRAYS)  # of adapters


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update number `count` (from 0).

    `warmup` rises linearly from `lr / warmup` to `lr`; then `constant`, half a `cosine`, `linear`, or `wsd` (constant,
    then linear over the last `decay` of all steps: Hu et al. 2024, arXiv 2404.06395), ending at `lr * lr_end`.
    `two-stage` is BitNet b1.58's ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"): a line from `lr` to 0 over all
    steps, which from half of them on is the line from `lr * lr_second`.
    """
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)

    def lr(count: Any) -> Array:
        t = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum((t + 1) / max(config.warmup, 1), 1.0)
        stable = config.steps * (1 - config.decay) if config.schedule == "wsd" else config.warmup
        p = jnp.clip((t - stable) / max(config.steps - 1 - stable, 1), 0.0, 1.0)
        match config.schedule:
            case "constant":
                shape = jnp.ones(())
            case "two-stage":
                second = jnp.where(t >= config.steps / 2, config.lr_second, 1.0)
                shape = second * (1 - t / config.steps)
            case "cosine":
                shape = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + jnp.cos(jnp.pi * p))
            case _:  # linear, and the decay of wsd
                shape = 1 - (1 - config.lr_end) * p
        return config.lr * warm * shape

    return lr


def factors(names: Iterable[str], config: TrainConfig) -> dict[str, float]:
    """Factor of the learning rate for each name: the first group that matches, else `scale_lr` for what a format
    learned (`path:scale`), else 1, which goes for adapters too. Raises `InputError` on a bad regex or a group that
    matches nothing."""
    names = list(names)
    groups = []
    for match, factor in config.lr_groups:
        try:
            groups.append((re.compile(match), factor))
        except re.error as e:
            raise InputError(f"lr_groups: {match!r} is not a regular expression: {e}") from e
        if not 0 <= factor < float("inf"):
            raise InputError(f"lr_groups: factor of {match!r} is {factor} (allowed: at least 0)")
        if not any(groups[-1][0].fullmatch(n) for n in names):
            raise InputError(f"lr_groups: {match!r} matches nothing (allowed: whole names such as {names[0]!r})")
    learned = {n: ":" in n and not n.endswith(FACTORS) for n in names}
    default = {True: config.scale_lr, False: 1.0}
    return {n: next((f for g, f in groups if g.fullmatch(n)), default[learned[n]]) for n in names}


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies (and Muon's orthogonal steps): to matrices of linears, not to norms, biases,
    embeddings, learned scales, or the factors of adapters, whose rank is what limits them."""
    return ndim == 2 and ":" not in name and not name.endswith("embed_tokens")


def build(config: TrainConfig, params: Mapping[str, Any], scale: Mapping[str, float]) -> optax.GradientTransformation:
    """The update rule for these named parameters (arrays or `ShapeDtypeStruct`s) with these factors of the rate."""
    mask = {n: decays(n, a.ndim) for n, a in params.items()}
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(_direction(config, mask))
    if config.weight_decay:
        last = config.decay_until * config.steps
        amount = lambda count: jnp.where(count < last, config.weight_decay, 0.0)  # noqa: E731
        parts.append(optax.add_decayed_weights(amount if config.decay_until < 1 else config.weight_decay, mask))
    if config.scale_decay:
        parts.append(
            optax.add_decayed_weights(config.scale_decay, {n: n.endswith(("scale",)) and ":" in n for n in params})
        )
    parts.append(optax.stateless(lambda u, _: {n: scale[n] * u[n] for n in u}))
    parts.append(optax.scale_by_learning_rate(schedule(config)))
    return optax.chain(*parts)


def _direction(config: TrainConfig, matrices: Mapping[str, bool]) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    match config.optimizer:
        case "adamw" | "adam":
            return adam
        case "sgd":
            return optax.trace(config.b1) if config.b1 else optax.identity()
        case "lion":
            return optax.scale_by_lion(config.b1, config.b2)
        case "muon":
            # Orthogonalised momentum for the linears, Adam for the rest; updates have Adam's RMS (arXiv 2502.16982),
            # so that one learning rate serves both. optax returns a descent step; the sign is the chain's to choose.
            dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)

            def specs(tree: Any) -> Any:
                return {n: dims if matrices[n] else None for n in tree}

            muon = optax.contrib.muon(
                1.0,
                beta=config.b1,
                adam_b1=config.b1,
                adam_b2=config.b2,
                eps=config.eps,
                muon_weight_dimension_numbers=specs,
                consistent_rms=0.2,
            )
            return optax.chain(muon, optax.scale(-1.0))
    raise unknown("optimizer", config.optimizer, OPTIMIZERS)

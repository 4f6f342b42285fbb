"""Codes that change: how many do at each step, which of them swing back and forth, and freezing those.

A latent near the boundary of two codes is pushed across it again and again by the straight-through gradient (Nagel et
al. 2022, "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086). A weight oscillates in a step
when its code changes in the direction opposite to its last change (section 3). The frequency is an exponential moving
average of that; what exceeds a threshold is frozen to the rounded moving average of its code (algorithm 1).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowbit.errors import InputError
from lowbit.formats.base import Format

Formats = Mapping[str, Format]
SHARES = ("flip_rate", "oscillating", "frozen")  # what `shares` reports


class Track(NamedTuple):
    """Of one weight, `[O, I]` each: its code now, the direction of its last change (-1, 0, 1), moving averages of
    oscillation and of the code, and whether it is frozen."""

    code: Array  # int32
    direction: Array  # int8
    frequency: Array  # float32
    mean: Array  # float32
    frozen: Array  # bool


class OscillationState(NamedTuple):
    inner: Any
    tracks: dict[str, Track]
    flips: Array  # codes that changed in the last step, float32


def track(
    tx: optax.GradientTransformation, formats: Formats, momentum: float = 0.99, threshold: float = 0.0
) -> optax.GradientTransformation:
    """`tx`, followed by a look at the codes of the latents in `formats`, by name; from a frequency above `threshold` on
    they are frozen (0: never). Parameters are a flat dict, a latent's learned arrays under `name:array`."""

    def codes(name: str, params: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        fmt, w = formats[name], params[name].astype(jnp.float32)
        own = {n.rpartition(":")[2]: a for n, a in params.items() if n.startswith(name + ":") and ":input" not in n}
        stored = fmt.stored(own or fmt.init(w))
        return fmt.quantize(w, stored), stored

    def init(params: Mapping[str, Array]) -> OscillationState:
        def one(name: str) -> Track:
            code, _ = codes(name, params)
            zero = jnp.zeros(code.shape)
            return Track(code, zero.astype(jnp.int8), zero, code.astype(jnp.float32), zero.astype(bool))

        return OscillationState(tx.init(params), {n: one(n) for n in formats}, jnp.zeros(()))

    def update(grads: Any, state: OscillationState, params: Any = None) -> tuple[Any, OscillationState]:
        updates, inner = tx.update(grads, state.inner, params)
        after = {n: params[n] + updates[n] for n in params}
        tracks, flips, out = {}, jnp.zeros(()), dict(updates)
        for name, old in state.tracks.items():
            code, stored = codes(name, after)
            if threshold:  # a frozen code stays, whatever the scale does
                code = jnp.where(old.frozen, nearest(formats[name], old.mean, stored), code)
                held = formats[name].dequantize(code, stored)
                out[name] = jnp.where(old.frozen, held - params[name], updates[name])
            change = jnp.sign(code - old.code).astype(jnp.int8)
            moved = change != 0
            swings = moved & (change == -old.direction)
            frequency = momentum * old.frequency + (1 - momentum) * swings
            mean = momentum * old.mean + (1 - momentum) * code
            mean = jnp.where(old.frozen, old.mean, mean)
            frozen = old.frozen | (frequency > threshold) if threshold else old.frozen
            tracks[name] = Track(code, jnp.where(moved, change, old.direction), frequency, mean, frozen)
            flips += jnp.sum(moved, dtype=jnp.float32)
        return out, OscillationState(inner, tracks, flips)

    return optax.GradientTransformation(init, update)


def nearest(fmt: Format, mean: Array, stored: Any) -> Array:
    """The code whose value is next to that of a mean code: not every whole number is one (mid-rise grids, mxfp4)."""
    low = jnp.floor(mean)
    part, below = mean - low, low.astype(jnp.int32)
    value = (1 - part) * fmt.dequantize(below, stored) + part * fmt.dequantize(below + 1, stored)
    return fmt.quantize(value, stored)


def check(formats: Formats, learned: Mapping[str, Any], arrays: Mapping[str, list[str]], freeze: bool) -> None:
    """Raises `InputError` for latents whose codes cannot be followed: scales that are frozen apart from them, and, for
    freezing, a format that does not give back the code of a code's value. `arrays` are the latents' own, by name."""
    for name, fmt in formats.items():
        for key in arrays[name]:
            if f"{name}:{key}" not in learned:
                raise InputError(f"{name}:{key} is frozen and its codes are tracked (allowed: scale_lr above 0)")
        if freeze and not fmt.idempotent:
            raise InputError(f"freeze_above with format {fmt.name!r} of {name} (allowed: grids that keep their values)")


def shares(state: Any) -> dict[str, Array]:
    """Shares of the tracked weights: that changed their code in the last step, whose frequency of oscillation exceeds
    0.005 (the paper's bound for counting them), and that are frozen; {} without a `track`."""
    found = [s for s in jax.tree.leaves(state, is_leaf=_ours) if _ours(s)]
    if not found:
        return {}
    tracks = list(found[0].tracks.values())
    n = float(max(sum(t.code.size for t in tracks), 1))
    counts = (
        found[0].flips,
        sum(jnp.sum(t.frequency > 0.005, dtype=jnp.float32) for t in tracks),
        sum(jnp.sum(t.frozen, dtype=jnp.float32) for t in tracks),
    )
    return {name: jnp.asarray(c / n, jnp.float32) for name, c in zip(SHARES, counts)}


def _ours(x: Any) -> bool:
    return isinstance(x, OscillationState)

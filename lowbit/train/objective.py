"""What is minimised: next-token cross-entropy, KL to or from a frozen teacher, or a mix of both; and, on top of any of
them, the distance of the hidden states to the teacher's.

An objective returns a *sum* over tokens and the number of tokens, so that microbatches and devices add up to the exact
token mean of the whole batch whatever their sizes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from lowbit.errors import InputError
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import head, hidden_states
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

Batch = Mapping[str, Array]
# (params, teacher params or None, batch) -> (sum of the loss over tokens, number of tokens), both float32 scalars
Objective = Callable[[Tree, Tree | None, Batch], tuple[Array, Array]]


def cross_entropy(logits_NV: Float[Array, "*n V"], targets_N: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """`-log softmax(logits)[target]` in nats, float32."""
    # A comparison instead of a gather: the gradient of a gather is a scatter, which costs CPUs two more passes.
    logits_NV = logits_NV.astype(jnp.float32)
    hot_NV = jax.lax.broadcasted_iota(targets_N.dtype, logits_NV.shape, logits_NV.ndim - 1) == targets_N[..., None]
    return jax.nn.logsumexp(logits_NV, axis=-1) - jnp.sum(jnp.where(hot_NV, logits_NV, 0.0), axis=-1)


def forward_kl(
    teacher_NV: Float[Array, "*n V"], student_NV: Float[Array, "*n V"], temperature: float = 1.0
) -> Float[Array, "*n"]:
    """`KL(teacher || student)` in nats, float32; scaled by `temperature ** 2` (Hinton et al. 2015, arXiv 1503.02531) so
    that gradients keep their size."""
    logp = jax.nn.log_softmax(teacher_NV.astype(jnp.float32) / temperature)
    logq = jax.nn.log_softmax(student_NV.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def reverse_kl(
    teacher_NV: Float[Array, "*n V"], student_NV: Float[Array, "*n V"], temperature: float = 1.0
) -> Float[Array, "*n"]:
    """`KL(student || teacher)` in nats, float32, scaled as `forward_kl` is (Gu et al. 2024, MiniLLM, arXiv 2306.08543:
    a student that cannot follow everywhere gives up modes instead of covering what the teacher excludes)."""
    return forward_kl(student_NV, teacher_NV, temperature)


def coarse(logits_NV: Float[Array, "*n V"], ids_NK: Int[Array, "*n K"]) -> Float[Array, "*n E"]:
    """Log-probabilities of the tokens `ids`, no two of which are equal, and behind them of all others together; just
    the former if K is V. float32."""
    logits_NV = logits_NV.astype(jnp.float32)
    all_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    logp_NK = jnp.take_along_axis(logits_NV, ids_NK, axis=-1) - all_N1
    if ids_NK.shape[-1] == logits_NV.shape[-1]:
        return logp_NK
    # Not log(1 - sum of the others): of a token that is nearly certain, that would be rounding errors.
    rest_NV = jnp.put_along_axis(logits_NV, ids_NK, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([logp_NK, jax.nn.logsumexp(rest_NV, axis=-1, keepdims=True) - all_N1], axis=-1)


def coarse_kl(
    goal_NE: Float[Array, "*n E"],
    ids_NK: Int[Array, "*n K"],
    student_NV: Float[Array, "*n V"],
    temperature: float = 1.0,
    direction: str = "forward",
) -> Float[Array, "*n"]:
    """KL between a teacher of which `coarse` is known, at this temperature, and the student's `coarse`.

    `sum over K of p log(p / q) + p_tail log(p_tail / q_tail)`, or the reverse: at most the KL over the vocabulary (what
    the tail is made of does not count), and equal to it if K is V. `goal` is normalised first: it may come rounded.
    """
    logp = jax.nn.log_softmax(goal_NE.astype(jnp.float32))
    logq = coarse(student_NV.astype(jnp.float32) / temperature, ids_NK)
    a, b = (logp, logq) if direction == "forward" else (logq, logp)
    return temperature**2 * jnp.sum(jnp.exp(a) * (a - b), axis=-1)


def hidden_distance(x_ND: Float[Array, "*n D"], y_ND: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """`|x - y|^2 / |y|^2` of each token, float32: the squared error over the teacher's mean square."""
    x_ND, y_ND = x_ND.astype(jnp.float32), y_ND.astype(jnp.float32)
    return jnp.sum(jnp.square(x_ND - y_ND), axis=-1) / jnp.maximum(jnp.sum(jnp.square(y_ND), axis=-1), 1e-30)


def split(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Array | None, Bool[Array, "B T"]]:
    """`(inputs, targets, segments of the inputs, which targets count)` of a batch.

    A batch holds `tokens [B, T+1]` and may hold `segments [B, T+1]` (the document of each token: a target in another
    document than its input does not count) and `mask [B, T]` (targets that count).
    """
    tokens = batch["tokens"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = jnp.ones(targets.shape, bool)
    segments = batch.get("segments")
    if segments is not None:
        mask = mask & (segments[:, 1:] == segments[:, :-1])
        segments = segments[:, :-1]
    if "mask" in batch:
        mask = mask & (batch["mask"] != 0)
    return inputs, targets, segments, mask


def language(
    model: ModelConfig, config: TrainConfig, teacher: ModelConfig | None = None, cached: bool = False
) -> Objective:
    """The objective that `config` names, for a decoder.

    Logits are computed `config.loss_chunk` positions at a time and again in the backward pass, so that `[B, T, V]`
    never exists for student and teacher. `hidden_weight` compares what the two heads get: the states after the last
    layer and its norm. With `cached`, the batch brings what is known of the teacher (`lowbit.train.teacher_cache`) in
    its place: `teacher_ids [B, T, K]` and `teacher_logp [B, T, K+1]`, the latter of `coarse`.

    Raises `InputError` when a term has no teacher, or vocabularies or (for `hidden_weight`) hidden sizes differ.
    """
    kl_weight = {"ce": 0.0, "kl": 1.0, "mixed": config.kl_weight}[config.loss]
    _check_teacher(model, config, teacher, cached)
    dtype = jnp.dtype(config.dtype)
    divergence = {"forward": forward_kl, "reverse": reverse_kl}[config.kl_direction]

    def loss(params: Tree, frozen: Tree | None, batch: Batch) -> tuple[Array, Array]:
        inputs, targets, segments, mask = split(batch)
        x, _ = hidden_states(params, inputs, model, segments_BT=segments, remat=config.remat, dtype=dtype)
        y, known = None, None
        if config.taught and cached:
            known = batch["teacher_logp"], batch["teacher_ids"].astype(jnp.int32)
        elif config.taught:
            assert frozen is not None and teacher is not None
            y, _ = hidden_states(frozen, inputs, teacher, segments_BT=segments, dtype=dtype)
            y = jax.lax.stop_gradient(y)

        def part(xs: tuple[Any, ...]) -> Array:
            x, y, known, targets, mask = xs
            total = jnp.zeros(targets.shape, jnp.float32)
            logits = head(params, x, model)
            if kl_weight < 1:
                total += (1 - kl_weight) * cross_entropy(logits, targets)
            if kl_weight > 0 and known is not None:
                total += kl_weight * coarse_kl(*known, logits, config.temperature, config.kl_direction)
            elif kl_weight > 0:
                goal = jax.lax.stop_gradient(head(frozen, y, teacher))
                total += kl_weight * divergence(goal, logits, config.temperature)
            if config.hidden_weight > 0:
                total += config.hidden_weight * hidden_distance(x, y)
            return jnp.sum(jnp.where(mask, total, 0.0))

        xs = (x, y, known, targets, mask)
        T, n = targets.shape[1], config.loss_chunk
        if n == 0 or n >= T:
            return part(xs), jnp.sum(mask, dtype=jnp.float32)
        whole = T // n * n
        parts = jax.tree.map(lambda a: rearrange(a[:, :whole], "B (C n) ... -> C B n ...", n=n), xs)
        # The body is recomputed in the backward pass: only its inputs are kept, never its logits.
        step = jax.checkpoint(part)
        total = jnp.sum(jax.lax.map(step, parts))
        if whole < T:
            total += step(jax.tree.map(lambda a: a[:, whole:], xs))
        return total, jnp.sum(mask, dtype=jnp.float32)

    return loss


def _check_teacher(model: ModelConfig, config: TrainConfig, teacher: ModelConfig | None, cached: bool) -> None:
    if not config.taught:
        return
    if cached and config.hidden_weight > 0:
        raise InputError(f"hidden_weight is {config.hidden_weight} with cached logits (allowed: 0, or a live teacher)")
    if teacher is None and cached:
        return
    if teacher is None:
        what = f"loss {config.loss!r}" if config.loss != "ce" else f"hidden_weight {config.hidden_weight}"
        raise InputError(f"{what} without a teacher (allowed without one: 'ce' and hidden_weight 0)")
    if teacher.vocab_size != model.vocab_size and config.loss != "ce":
        sizes = f"{teacher.vocab_size} tokens (allowed: the student's {model.vocab_size})"
        raise InputError(f"teacher has a vocabulary of {sizes}")
    if teacher.hidden_size != model.hidden_size and config.hidden_weight > 0:
        raise InputError(
            f"hidden_weight is {config.hidden_weight} for a teacher with hidden states of {teacher.hidden_size} values "
            f"(allowed: 0, or the student's {model.hidden_size})"
        )

"""What is minimised: next-token cross-entropy, forward KL to a frozen teacher, or a mix of both.

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


def language(model: ModelConfig, config: TrainConfig, teacher: ModelConfig | None = None) -> Objective:
    """The objective that `config.loss` names, for a decoder.

    Logits are computed `config.loss_chunk` positions at a time and again in the backward pass, so that `[B, T, V]`
    never exists for student and teacher. Raises `InputError` when KL has no teacher or vocabularies differ.
    """
    if config.loss != "ce":
        if teacher is None:
            raise InputError(f"loss {config.loss!r} without a teacher (allowed without one: 'ce')")
        if teacher.vocab_size != model.vocab_size:
            sizes = f"{teacher.vocab_size} tokens (allowed: the student's {model.vocab_size})"
            raise InputError(f"teacher has a vocabulary of {sizes}")
    dtype = jnp.dtype(config.dtype)
    kl_weight = {"ce": 0.0, "kl": 1.0, "mixed": config.kl_weight}[config.loss]

    def loss(params: Tree, frozen: Tree | None, batch: Batch) -> tuple[Array, Array]:
        inputs, targets, segments, mask = split(batch)
        x, _ = hidden_states(params, inputs, model, segments_BT=segments, remat=config.remat, dtype=dtype)
        y = None
        if kl_weight > 0:
            assert frozen is not None and teacher is not None
            y, _ = hidden_states(frozen, inputs, teacher, segments_BT=segments, dtype=dtype)
            y = jax.lax.stop_gradient(y)

        def part(xs: tuple[Any, ...]) -> Array:
            x, y, targets, mask = xs
            logits = head(params, x, model)
            total = jnp.zeros(targets.shape, jnp.float32)
            if kl_weight < 1:
                total += (1 - kl_weight) * cross_entropy(logits, targets)
            if y is not None:
                goal = jax.lax.stop_gradient(head(frozen, y, teacher))
                total += kl_weight * forward_kl(goal, logits, config.temperature)
            return jnp.sum(jnp.where(mask, total, 0.0))

        xs = (x, y, targets, mask)
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

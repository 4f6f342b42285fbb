"""Decoding with a key-value cache: one compiled prefill per padded prompt length, one compiled step for every token.

Prompts of different lengths share a batch by padding at the right, and each row goes on at its own length, so a row's
result is that of the prompt alone.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.models.cache import Cache, init_cache
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import head, hidden_states
from lowbit.models.model import Model
from lowbit.tree import Tree

BUCKET = 16  # shortest padded prompt; others are padded to the next power of two, so few programs are compiled


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
    dtype: Any = jnp.float32,
) -> list[list[int]]:
    """New token ids for each prompt (token ids, BOS included if wanted): up to `max_tokens`, without the EOS.

    `temperature=0` takes the most probable token; otherwise samples from the `top_k` most probable and from the
    smallest set with probability `top_p`, the same for the same seed. `dtype` is that of computation and cache. Raises
    `InputError` for an empty prompt, ids outside the vocabulary, options out of range, and texts that would go beyond
    `max_position`.
    """
    eos = set(model.config.eos_token_ids) | set(getattr(model.tokenizer, "eos_ids", ()))
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for tokens in _steps(model, prompts, max_tokens, temperature, top_k, top_p, seed, dtype):
        for i, token in enumerate(tokens):
            done[i] = done[i] or (stop_at_eos and token in eos)
            if not done[i]:
                out[i].append(token)
        if all(done):
            break
    return out


def stream(model: Model, prompt: Sequence[int], max_tokens: int, **options: Any) -> Iterator[int]:
    """The tokens of `generate` for one prompt as they come; same options."""
    stop_at_eos = options.pop("stop_at_eos", True)
    eos = set(model.config.eos_token_ids) | set(getattr(model.tokenizer, "eos_ids", ()))
    defaults = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0, "dtype": jnp.float32}
    for tokens in _steps(model, [prompt], max_tokens, **(defaults | options)):
        if stop_at_eos and tokens[0] in eos:
            return
        yield tokens[0]


def _steps(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    dtype: Any,
) -> Iterator[list[int]]:
    """The next token of every prompt, `max_tokens` times."""
    c = model.config
    _check(c, prompts, max_tokens, temperature, top_k, top_p)
    if not prompts or not max_tokens:
        return
    T, size = padded(prompts, max_tokens)
    tokens = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    counts = jnp.asarray([len(p) for p in prompts], jnp.int32)
    cache = init_cache(model.params, c, len(prompts), size, dtype)
    logits, cache = _advance(model.params, jnp.asarray(tokens), counts, cache, c, jnp.dtype(dtype))
    key, ones = jax.random.key(seed), jnp.ones(len(prompts), jnp.int32)
    for i in range(max_tokens):
        next_B = _choose(logits, jax.random.fold_in(key, i), temperature, top_p or 1.0, top_k, temperature == 0)
        yield np.asarray(next_B).tolist()
        if i + 1 < max_tokens:
            logits, cache = _advance(model.params, next_B[:, None], ones, cache, c, jnp.dtype(dtype))


def padded(prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[int, int]:
    """What `generate` allocates: the length that prompts are padded to, and the positions of the cache."""
    T = max(BUCKET, 1 << (max(map(len, prompts)) - 1).bit_length())
    return T, -(-(T + max_tokens) // 64) * 64


def _check(
    c: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_tokens < 0:
        raise InputError(f"max_tokens is {max_tokens} (allowed: 0 or more)")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature} (allowed: 0, or a positive number)")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k} (allowed: 1 or more)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p} (allowed: above 0, up to 1)")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty (allowed: at least one token, such as BOS)")
        if min(prompt) < 0 or max(prompt) >= c.vocab_size:
            raise InputError(f"prompt {i} has token ids up to {max(prompt)} (allowed: 0 to {c.vocab_size - 1})")
        if len(prompt) + max_tokens > c.max_position:
            raise InputError(
                f"prompt {i} of {len(prompt)} tokens and {max_tokens} new ones (the model's max_position_embeddings is "
                f"{c.max_position})"
            )


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="cache")
def _advance(
    params: Tree, tokens_BT: Int[Array, "B T"], count_B: Int[Array, " B"], cache: Cache, config: ModelConfig, dtype: Any
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last real token of each row, and the cache with the first `count_B` tokens in it."""
    x, cache = hidden_states(params, tokens_BT, config, cache=cache, count_B=count_B, scan=False, dtype=dtype)
    return head(params, x[jnp.arange(len(count_B)), count_B - 1], config), cache


@partial(jax.jit, static_argnames=("top_k", "greedy"))
def _choose(
    logits_BV: Float[Array, "B V"],
    key: Array,
    temperature: float | Array,
    top_p: float | Array,
    top_k: int | None,
    greedy: bool,
) -> Int[Array, " B"]:
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    best_BK, ids_BK = likeliest(logits_BV, temperature, top_p, top_k)
    picked_B = jax.random.categorical(key, best_BK, axis=-1)
    return jnp.take_along_axis(ids_BK, picked_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def likeliest(
    logits_BV: Float[Array, "B V"], temperature: float | Array, top_p: float | Array, top_k: int | None
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Logits over `temperature` of what may be drawn (-inf where `top_p` excludes it), and the token ids."""
    logits_BV = logits_BV / temperature
    best_BK, ids_BK = jax.lax.top_k(logits_BV, min(top_k or logits_BV.shape[1], logits_BV.shape[1]))
    p_BK = jax.nn.softmax(best_BK, axis=-1)
    before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK  # a token stays if those above it fall short of top_p
    return jnp.where(before_BK < top_p, best_BK, -jnp.inf), ids_BK

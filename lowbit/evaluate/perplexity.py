"""Perplexity of a model on a text and its divergence from a reference, in float32, with bounded memory.

Both models run on the same windows; from their last hidden states, logits are made and reduced a few positions at a
time, so `[batch, positions, vocabulary]` never exists. Only a few numbers per scored token are kept, for percentiles.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.evaluate import size
from lowbit.evaluate.convention import Windows, windows
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import head, hidden_states
from lowbit.models.model import Model
from lowbit.tree import Tree

BATCH = 8
OnBatch = Callable[[int, int], None]  # batches done, batches
_LOGIT_FLOATS = 1 << 24  # logits of one model that exist at once: 64 MiB
PERCENTILES = {"kl_median": 50.0, "kl_p90": 90.0, "kl_p99": 99.0, "kl_p99_9": 99.9}


def divergence(logp_NV: Float[Array, "N V"], logq_NV: Float[Array, "N V"]) -> Float[Array, " N"]:
    """KL(p || q) in nats of log-probabilities."""
    return jnp.sum(jnp.exp(logp_NV) * (logp_NV - logq_NV), axis=-1)


@partial(jax.jit, static_argnames=("configs", "dtypes"))
def _score(
    params: tuple[Tree, ...],
    tokens_BT: Int[Array, "B T"],
    configs: tuple[ModelConfig, ...],
    dtypes: tuple[Any, ...],
) -> dict[str, Float[Array, "B S"]]:
    """Per predicted token `[B, T - 1]`: `nll` in nats, and with a second model (the reference) `kl` and `same_top1`."""
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
    B, T = inputs.shape
    hidden = [hidden_states(p, inputs, c, dtype=d)[0] for p, c, d in zip(params, configs, dtypes)]
    hidden = [x.astype(jnp.float32) for x in hidden]  # logits are float32 whatever the blocks compute in

    def part(xs: Any) -> dict[str, Array]:
        *states, targets_N = xs
        logits = [head(p, x, c) for p, x, c in zip(params, states, configs)]
        logps = [jax.nn.log_softmax(l) for l in logits]
        out = {"nll": -jnp.take_along_axis(logps[0], targets_N[:, None], axis=-1)[:, 0]}
        if len(logps) == 2:
            out["kl"] = divergence(logps[1], logps[0])
            out["same_top1"] = (jnp.argmax(logits[0], -1) == jnp.argmax(logits[1], -1)).astype(jnp.float32)
        return out

    chunk = min(B * T, max(1, _LOGIT_FLOATS // configs[0].vocab_size))
    parts = -(-B * T // chunk)
    pad = parts * chunk - B * T
    flat = [jnp.pad(rearrange(x, "B T D -> (B T) D"), ((0, pad), (0, 0))) for x in hidden]
    split = [rearrange(x, "(P N) D -> P N D", P=parts) for x in flat]
    goal = rearrange(jnp.pad(rearrange(targets, "B T -> (B T)"), (0, pad)), "(P N) -> P N", P=parts)
    out = jax.lax.map(part, (*split, goal))
    return {k: v.reshape(-1)[: B * T].reshape(B, T) for k, v in out.items()}


def token_scores(
    model: Model,
    w: Windows,
    reference: Model | None = None,
    batch: int = BATCH,
    dtype: Any = jnp.float32,
    on_batch: OnBatch | None = None,
) -> dict[str, np.ndarray]:
    """Per scored token, in text order, float32: `nll`, and with a reference `kl` = KL(reference || model), `same_top1`.

    The reference always computes in float32, the model in `dtype`. The last batch is padded, so one shape compiles.
    """
    both = [model] if reference is None else [model, reference]
    dtypes = (jnp.dtype(dtype), jnp.dtype(jnp.float32))[: len(both)]
    kept: dict[str, list[np.ndarray]] = {}
    for done, (rows, mask) in enumerate(_batches(w, batch), 1):
        scores = _score(tuple(m.params for m in both), jnp.asarray(rows), tuple(m.config for m in both), dtypes)
        for key, value in scores.items():
            kept.setdefault(key, []).append(np.asarray(value)[mask])
        if on_batch is not None:
            on_batch(done, -(-len(w.tokens) // batch))
    return {k: np.concatenate(v) for k, v in kept.items()}


def _batches(w: Windows, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    batch = min(batch, len(w.tokens))
    for at in range(0, len(w.tokens), batch):
        rows, mask = w.tokens[at : at + batch], w.scored[at : at + batch, 1:]
        extra = ((0, batch - len(rows)), (0, 0))
        yield np.pad(rows, extra), np.pad(mask, extra)


def evaluate(
    model: Model,
    text: str | Sequence[str],
    reference: Model | None = None,
    convention: str | None = None,
    *,
    batch: int = BATCH,
    dtype: Any = jnp.float32,
    self_noise: bool = False,
    on_batch: OnBatch | None = None,
) -> dict[str, Any]:
    """Measures `model` on a text (or documents), and against `reference` if there is one.

    Args:
      convention: see `lowbit.evaluate.convention`; by default `gptq-N`, N the model's context (4096 at most).
      batch: windows a step.
      dtype: compute dtype of `model`; the reference computes in float32.
      self_noise: adds `self_noise`, what the *reference* gets against itself when it computes in bfloat16: the floor
        below which a divergence says nothing.
      on_batch: called with the batches done and their number, first for the model and then for the noise.

    Returns:
      `nats_per_token`, `perplexity`, `perplexity_stderr`, `convention`, `bits_per_byte` (total bits / bytes that the
      scored tokens stand for), `tokens` (scored), `windows`; with a reference `kl_mean`, `kl_mean_stderr`,
      `kl_median`, `kl_p90`, `kl_p99`, `kl_p99_9` (nats, KL(reference || model) per scored token) and `same_top1` (a
      fraction); `file_bytes` (None if the model is no local file), `bits_per_weight`, `bits_per_weight_quantized`.

    Raises:
      InputError: no tokenizer, a text that fills no window, a reference with another tokenizer or vocabulary, logits
        that are not finite.
    """
    w = windows_of(model, text, convention)
    if self_noise and reference is None:
        raise InputError("self_noise without a reference (allowed: together with one)")
    if reference is not None:
        _check_reference(model, reference, w, text)
    scores = token_scores(model, w, reference, batch, dtype, on_batch)
    out = summarise(scores, w, model)
    if self_noise:
        noise = token_scores(reference, w, reference, batch, jnp.bfloat16, on_batch)
        out["self_noise"] = summarise(noise, w, reference, sizes=False)
    return out


def windows_of(model: Model, text: str | Sequence[str], convention: str | None = None) -> Windows:
    """The windows of a text for a model. Raises `InputError` as `evaluate` does."""
    if model.tokenizer is None:
        raise InputError(f"model {model.source or '(unnamed)'} has no tokenizer (allowed: a model with one)")
    w = windows(text, model.tokenizer, convention, model.config.max_position)
    if w.tokens.max() >= model.config.vocab_size:
        raise InputError(
            f"tokenizer gives id {w.tokens.max()} (allowed: below the model's vocabulary, {model.config.vocab_size})"
        )
    return w


def _check_reference(model: Model, reference: Model, w: Windows, text: str | Sequence[str]) -> None:
    if reference.config.vocab_size != model.config.vocab_size:
        have = f"{reference.config.vocab_size} tokens (allowed: the model's {model.config.vocab_size})"
        raise InputError(f"reference {reference.source} has a vocabulary of {have}")
    if reference.tokenizer is None or reference.tokenizer is model.tokenizer:
        return
    if reference.tokenizer.hash != model.tokenizer.hash:  # kinds may differ (GGUF, HF): what counts are the ids
        theirs = windows_of(reference, text, w.convention)
        if not np.array_equal(theirs.tokens, w.tokens):
            raise InputError(f"reference {reference.source} tokenises the text differently (allowed: the same ids)")


def summarise(scores: dict[str, np.ndarray], w: Windows, model: Model, sizes: bool = True) -> dict[str, Any]:
    """The dictionary of `evaluate` from per-token scores, accumulated in float64."""
    nll = scores["nll"].astype(np.float64)
    if not all(np.isfinite(v).all() for v in scores.values()):
        raise InputError(f"model {model.source or '(unnamed)'} gives logits that are not finite (allowed: finite ones)")
    nats = float(nll.mean())
    perplexity = math.exp(nats) if nats < 700 else math.inf
    out: dict[str, Any] = {
        "nats_per_token": nats,
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * _stderr(nll),
        "convention": w.convention,
        "bits_per_byte": float(nll.sum() / math.log(2) / scored_bytes(w, model.tokenizer)),
        "tokens": int(nll.size),
        "windows": len(w.tokens),
    }
    if "kl" in scores:
        kl = scores["kl"].astype(np.float64)
        out |= {"kl_mean": float(kl.mean()), "kl_mean_stderr": _stderr(kl)}
        out |= {k: float(np.percentile(kl, p)) for k, p in PERCENTILES.items()}
        out["same_top1"] = float(scores["same_top1"].mean(dtype=np.float64))
    if sizes:
        out["file_bytes"] = size.file_bytes(model.source)
        measured = size.sizes(model.params)
        out |= {k: measured[k] for k in ("bits_per_weight", "bits_per_weight_quantized")}
    return out


def scored_bytes(w: Windows, tokenizer: Any) -> int:
    """Bytes of text that the scored tokens stand for; control tokens stand for none."""
    return max(1, int(tokenizer.token_bytes[w.tokens[w.scored]].sum(dtype=np.int64)))


def _stderr(x: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.inf

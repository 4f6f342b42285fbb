"""llama.cpp's `--kl-divergence-base` file: reference log-probabilities of a text, 16 bits each.

Layout (little-endian): `_logits_`, int32 window size N, int32 vocabulary V, int32 windows C, int32 tokens `[C N]`; then
per window and scored position (logits N/2 to N-2) `2 ceil(V / 2) + 4` uint16, of which the first four are float32 scale
and float32 lowest log-probability and the next V are codes q: `log p = scale q + lowest`. Logits more than 16 below the
largest are clipped. The 16 bits alone cost about 5e-4 nats on a large vocabulary, so `evaluate(..., reference)` keeps
float32 and this file is for exchange with llama-perplexity.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit.errors import InputError
from lowbit.evaluate.convention import Windows
from lowbit.evaluate.perplexity import OnBatch, summarise, windows_of
from lowbit.files import atomic_path
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.models.model import Model
from lowbit.tree import Tree

MAGIC = b"_logits_"
_CLIP = 16.0  # nats below the largest logit
_HEADER = 20


def quantize_logits(logits_SV: np.ndarray) -> np.ndarray:
    """One window's record, uint16 `[S, 2 ceil(V / 2) + 4]`, of float32 logits `[S, V]`."""
    logits = np.asarray(logits_SV, np.float32)
    S, V = logits.shape
    top = logits.max(axis=-1, keepdims=True)
    low = np.maximum(logits.min(axis=-1, keepdims=True), top - np.float32(_CLIP))
    total = np.log(np.exp(logits - top, dtype=np.float32).sum(axis=-1, keepdims=True, dtype=np.float64))
    scale = ((top - low) / np.float32(65535)).astype(np.float32)
    lowest = (low - top - total).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    out = np.zeros((S, 2 * ((V + 1) // 2) + 4), "<u2")
    out[:, :4] = np.concatenate([scale, lowest], axis=-1).astype("<f4").view("<u2")
    out[:, 4 : 4 + V] = np.where(logits > low, np.clip(np.rint((logits - low) * inverse), 0, 65535), 0)
    return out


class KldFile:
    """A base file, mapped: `n_ctx`, `n_vocab`, `tokens` `[C, N]` int32, and `log_probs(c)`."""

    def __init__(self, path: str | Path):
        """Raises `InputError` for a file of another kind or one that is cut off."""
        try:
            with open(path, "rb") as f:
                header = f.read(_HEADER)
            have = os.path.getsize(path)
        except OSError as e:
            raise InputError(f"cannot read KL base file {path}: {e.strerror or e}") from e
        if len(header) < _HEADER or header[:8] != MAGIC:
            raise InputError(f"{path} starts with {header[:8]!r} (allowed: a KL base file, {MAGIC!r})")
        self.path = Path(path)
        self.n_ctx, self.n_vocab, self.windows = (int(x) for x in np.frombuffer(header, "<i4", 3, 8))
        if self.n_ctx < 4 or self.n_vocab < 1 or self.windows < 1:
            sizes = f"{self.windows} windows of {self.n_ctx} tokens, vocabulary {self.n_vocab}"
            raise InputError(f"{path} has {sizes} (allowed: positive, windows of at least 4)")
        self.scored = self.n_ctx - 1 - self.n_ctx // 2
        width = 2 * ((self.n_vocab + 1) // 2) + 4
        start = _HEADER + 4 * self.windows * self.n_ctx
        need = start + 2 * self.windows * self.scored * width
        if have != need:
            raise InputError(f"{path} has {have} bytes (allowed: {need}, as its header says)")
        tokens = np.fromfile(path, "<i4", self.windows * self.n_ctx, offset=_HEADER)
        self.tokens = tokens.reshape(self.windows, self.n_ctx).astype(np.int32)
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise InputError(f"{path} has token {self.tokens.max()} (allowed: 0 to {self.n_vocab - 1})")
        shape = (self.windows, self.scored, width)
        self._records = np.memmap(path, "<u2", "r", offset=start, shape=shape)

    def log_probs(self, window: int) -> np.ndarray:
        """Reference log-probabilities of a window's scored positions, float32 `[N - 1 - N/2, V]`."""
        record = np.asarray(self._records[window])
        head = np.ascontiguousarray(record[:, :4]).view("<f4")
        return record[:, 4 : 4 + self.n_vocab] * head[:, :1] + head[:, 1:]


@partial(jax.jit, static_argnames=("config", "first"))
def _half(params: Tree, tokens_BT: Array, config: ModelConfig, first: int) -> Float[Array, "B S V"]:
    return forward(params, tokens_BT[:, :-1], config)[:, first:]


def write_kld(model: Model, text: str | Sequence[str], path: str | Path, n_ctx: int = 512) -> int:
    """Writes the base file of a model on a text, window by window; returns the number of windows."""
    w = windows_of(model, text, f"llamacpp-{n_ctx}")
    with atomic_path(path) as tmp, open(tmp, "wb") as f:
        f.write(MAGIC + np.array([n_ctx, model.config.vocab_size, len(w.tokens)], "<i4").tobytes())
        f.write(w.tokens.astype("<i4").tobytes())
        for row in w.tokens:
            logits = np.asarray(_half(model.params, jnp.asarray(row[None]), model.config, n_ctx // 2))[0]
            if not np.isfinite(logits).all():
                raise InputError(f"model {model.source} gives logits that are not finite (allowed: finite ones)")
            f.write(quantize_logits(logits).tobytes())
    return len(w.tokens)


@partial(jax.jit, static_argnames=("config", "first"))
def _against(
    params: Tree, tokens_BT: Array, base_SV: Array, config: ModelConfig, first: int
) -> dict[str, Float[Array, " S"]]:
    logits = forward(params, tokens_BT[:, :-1], config)[0, first:]
    logq = jax.nn.log_softmax(logits)
    # llama-perplexity leaves out what the reference gives less than e^-16: those codes are clipped.
    terms = jnp.where(base_SV > -_CLIP, jnp.exp(base_SV) * (base_SV - logq), 0.0)
    targets = tokens_BT[0, first + 1 :]
    return {
        "nll": -jnp.take_along_axis(logq, targets[:, None], axis=-1)[:, 0],
        "kl": terms.sum(axis=-1),
        "same_top1": (jnp.argmax(base_SV, -1) == jnp.argmax(logits, -1)).astype(jnp.float32),
    }


def evaluate_against_kld(model: Model, path: str | Path, on_batch: OnBatch | None = None) -> dict[str, Any]:
    """The dictionary of `evaluate` (convention `llamacpp-N`) with the file's text and reference, as llama-perplexity
    computes it: BOS replaces the first token of each window if the tokenizer adds one. `on_batch(done, windows)`
    follows the work.

    Raises `InputError` when the vocabulary differs or the windows are longer than the model's context.
    """
    base = KldFile(path)
    config = model.config
    if base.n_vocab != config.vocab_size:
        raise InputError(f"{path} has a vocabulary of {base.n_vocab} (allowed: the model's {config.vocab_size})")
    if base.n_ctx > config.max_position:
        raise InputError(
            f"{path} has windows of {base.n_ctx} (allowed: at most the model's context, {config.max_position})"
        )
    if model.tokenizer is None:
        raise InputError(f"model {model.source or '(unnamed)'} has no tokenizer (allowed: a model with one)")
    first = base.n_ctx // 2
    tokens = base.tokens.copy()
    if model.tokenizer.adds_bos:
        tokens[:, 0] = model.tokenizer.bos_id
    scored = np.zeros(tokens.shape, bool)
    scored[:, first + 1 :] = True
    kept: dict[str, list[np.ndarray]] = {}
    for c, row in enumerate(tokens):
        out = _against(model.params, jnp.asarray(row[None]), jnp.asarray(base.log_probs(c)), config, first)
        for key, value in out.items():
            kept.setdefault(key, []).append(np.asarray(value))
        if on_batch is not None:
            on_batch(c + 1, len(tokens))
    scores = {k: np.concatenate(v) for k, v in kept.items()}
    return summarise(scores, Windows(tokens, scored, f"llamacpp-{base.n_ctx}"), model)

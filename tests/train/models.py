"""A tiny decoder and deterministic rows for the training tests."""

import jax
import numpy as np

from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 64)


def params(seed: int = 0):
    """Random weights, ten times larger than usual so that logits differ visibly."""
    return jax.tree.map(lambda a: a * (10.0 if a.ndim == 2 else 1.0), init_params(CONFIG, jax.random.key(seed)))


def rows(size: int = 4, length: int = 16, segments: bool = False):
    """`batch(step)` over a sequence that can be learned (x -> 3 x + 1 mod 61), with noise."""

    def batch(step: int):
        rng = np.random.default_rng([7, step])
        tokens = np.zeros((size, length + 1), np.int32)
        tokens[:, 0] = rng.integers(0, 61, size)
        for t in range(length):
            tokens[:, t + 1] = (3 * tokens[:, t] + 1) % 61
        noise = rng.random(tokens.shape) < 0.1
        tokens[noise] = rng.integers(0, 64, int(noise.sum()))
        out = {"tokens": tokens}
        if segments:
            out["segments"] = np.cumsum(rng.random(tokens.shape) < 0.15, axis=1).astype(np.int32)
        return out

    return batch

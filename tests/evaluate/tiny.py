"""A byte-level model small enough to evaluate in a blink, and a text."""

import jax
import numpy as np

from lowbit.data.tokenizer import ByteTokenizer
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.model import Model

CONFIG = ModelConfig("llama", 258, 32, 48, 2, 4, 2, 8, 64, tied=True)
TEXT = " ".join(f"Number {i} is {i * i}, naïvely." for i in range(40))


def model(seed: int = 0, scale: float = 8.0) -> Model:
    """Random weights, scaled up so that the predictions are far from uniform."""
    params = jax.tree.map(lambda a: a * scale if a.ndim == 2 else a, init_params(CONFIG, jax.random.key(seed)))
    return Model(CONFIG, params, ByteTokenizer())


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

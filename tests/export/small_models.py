"""Small random models of every family, every width a multiple of 256 so that each GGUF type fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.models.config import ModelConfig, RopeScaling
from lowbit.models.decoder import init_params
from lowbit.models.model import Model
from lowbit.ptq.rtn import encode

VOCAB = 300  # above the byte tokenizer's 258: the vocabulary is padded
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=128,
    norm_eps=1e-6,
    bos_token_id=256,
    eos_token_ids=(257,),
)
GEMMA = dict(activation="gelu_tanh", tied=True, sandwich_norm=True, norm_plus_one=True, embed_scale=16.0, head_dim=128)
GEMMA3 = GEMMA | dict(qk_norm=True, num_layers=7, sliding_window=8, rope_theta=1e6, rope_local_theta=1e4)
CASES = {
    "llama": dict(family="llama"),
    "llama-tied-bias": dict(family="llama", qkv_bias=True, o_bias=True, mlp_bias=True, tied=True, head_dim=128),
    "llama3-rope": dict(family="llama", rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "llama-linear-rope": dict(family="llama", rope_scaling=RopeScaling("linear", 2.0)),
    "mistral": dict(family="mistral", sliding_window=64, sliding_layers=(True, True)),
    "qwen2": dict(family="qwen2", qkv_bias=True),
    "qwen3": dict(family="qwen3", qk_norm=True, head_dim=128, tied=True),
    "gemma2": GEMMA
    | dict(family="gemma2", attn_softcap=50.0, final_softcap=30.0, sliding_window=8, sliding_layers=(True, False)),
    "gemma3": GEMMA3 | dict(family="gemma3_text", sliding_layers=tuple((i + 1) % 6 != 0 for i in range(7))),
    "gemma3-pattern": GEMMA3 | dict(family="gemma3_text", sliding_layers=(True, False, True, True, False, True, False)),
}


def config(name: str, **changes) -> ModelConfig:
    return ModelConfig(**(BASE | CASES[name] | changes))


@functools.cache
def _params(c: ModelConfig, seed: int, dtype) -> dict:
    rng = np.random.default_rng(seed)

    def widen(path, w):
        noise = jnp.asarray(0.2 * rng.standard_normal(w.shape), jnp.float32)
        return (w + noise if w.ndim == 1 else 4 * w).astype(dtype)

    return trees.map_leaves(widen, init_params(c, jax.random.key(seed)))


def model(name: str = "llama", seed: int = 0, tokenizer=None, dtype=jnp.float32, **changes) -> Model:
    """Weights large enough that every part matters, norms and biases away from their defaults."""
    c = config(name, **changes)
    return Model(c, _params(c, seed, dtype), tokenizer)


def byte_model(name: str = "llama", **changes) -> Model:
    return model(name, tokenizer=ByteTokenizer(), **changes)


def packed(m: Model, format: str, match: str = ".layers.") -> Model:
    """`m` with the matrices whose path contains `match` in a format."""
    fmt = formats.get(format)

    def one(path, w):
        return encode(fmt, w) if not isinstance(w, QTensor) and w.ndim == 2 and match in path else w

    return m.replace(params=trees.map_leaves(one, m.params))


def weights(leaf) -> np.ndarray:
    return np.asarray(leaf.decode() if isinstance(leaf, QTensor) else leaf)

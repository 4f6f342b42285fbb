"""Small random models of every kind."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.formats import base as formats
from lowbit.formats.base import Latent
from lowbit.models import decoder
from lowbit.models.config import ModelConfig, RopeScaling
from lowbit.models.model import Model

# Compiled whole: one program, where each operation by itself is another one to compile.
forward = jax.jit(decoder.forward, static_argnames=("config", "remat", "dtype"))
hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "remat", "scan", "dtype"))

LLAMA = ModelConfig("llama", 61, 32, 48, 3, 4, 2, 8, 64, bos_token_id=1, eos_token_ids=(2,))
GEMMA = dict(
    sandwich_norm=True,
    norm_plus_one=True,
    activation="gelu_tanh",
    tied=True,
    embed_scale=math.sqrt(32),
    query_scale=8**-0.5,
    final_softcap=3.0,
    sliding_window=5,
    norm_eps=1e-6,
)
CONFIGS = {
    "llama": LLAMA,
    "llama3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), tied=True),
    "llama-biases": dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(LLAMA, family="mistral", sliding_window=5, sliding_layers=(True,) * 3),
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, bos_token_id=None),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True),
    "gemma2": dataclasses.replace(
        LLAMA, family="gemma2", attn_softcap=5.0, sliding_layers=(True, False, True), **GEMMA
    ),
    "gemma3": dataclasses.replace(
        LLAMA,
        family="gemma3_text",
        qk_norm=True,
        rope_local_theta=1e3,
        rope_scaling=RopeScaling("linear", 4.0),
        sliding_layers=(True, True, False),
        **GEMMA,
    ),
    "bitnet": dataclasses.replace(LLAMA, family="bitnet", sub_norm="sub", activation="relu2", rope_theta=500000.0),
    "bit": dataclasses.replace(LLAMA, input_norm=False, linear_norm=True, tied=True),
}


def params_of(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> trees.Tree:
    """Random weights large enough that a mistake anywhere shows in the logits."""

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        rng = np.random.default_rng([seed, *path.encode()])  # numpy's: nothing to compile
        std = 0.3 if len(shape) == 1 else 1.0 if "embed" in path or "lm_head" in path else 2.0 * shape[1] ** -0.5
        mean = float(path.endswith("norm") and not config.norm_plus_one)
        return jnp.asarray((mean + std * rng.standard_normal(shape)).astype(dtype))

    return trees.build({path: draw(path, shape) for path, shape in config.shapes().items()})


def tiny(name: str = "llama", dtype=jnp.float32, **changes) -> Model:
    config = dataclasses.replace(CONFIGS[name], **changes)
    return Model(config, params_of(config, dtype=dtype))


def quantized(model: Model, assignment: dict[str, str], latent: bool = False) -> Model:
    """The model with some paths as `QTensor`s, or as `Latent`s."""

    def encode(path: str, a: jax.Array):
        if path not in assignment:
            return a
        fmt = formats.get(assignment[path])
        return Latent(a, fmt.init(a.astype(jnp.float32)), fmt) if latent else fmt.encode(a)

    return model.replace(params=trees.map_leaves(encode, model.params))

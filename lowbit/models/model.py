"""A model as every command passes it around: configuration, parameters, tokenizer and where it came from."""

import dataclasses
import hashlib
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.activation import ActFormat, get_act
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.tree import Tree


class Tokenizer(Protocol):
    """What a model asks of its tokenizer (`lowbit.data.tokenizer` has the implementations)."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids; `bos=None` follows the tokenizer's own rule."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class Model:
    """`params` is a `lowbit.tree` whose leaves are arrays, `QTensor`s, weights in training or `PreparedInput`s, and
    `CacheSite`s.

    `source` is the path or hub id it was read from; `meta` holds what a reader found beyond that (`format`, `dtype`).
    """

    config: ModelConfig
    params: Tree
    tokenizer: Any = None  # a `Tokenizer`, or None
    source: str = ""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def logits(self, tokens: Any, dtype: Any = jnp.float32) -> Float[Array, "*batch T V"]:
        """Float32 logits of `tokens` `[T]` or `[B, T]`, computed in `dtype`; compiled once per config and shape."""
        tokens = jnp.asarray(np.asarray(tokens, np.int32))
        out = _logits(self.params, tokens if tokens.ndim == 2 else tokens[None], self.config, jnp.dtype(dtype))
        return out if tokens.ndim == 2 else out[0]

    def fingerprint(self) -> str:
        """SHA-256 of what decides the logits: configuration, formats and every stored array."""
        h = hashlib.sha256(repr(self.config).encode())
        for path, leaf in trees.items(self.params):
            h.update(f"\n{path} {jax.tree.structure(leaf)}".encode())
            for key, a in jax.tree_util.tree_leaves_with_path(leaf):
                h.update(f"\n{jax.tree_util.keystr(key)} {a.dtype} {a.shape}\n".encode())
                h.update(np.ascontiguousarray(a).tobytes())
        return h.hexdigest()

    def replace(self, **changes: Any) -> "Model":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def with_inputs(model: Model, act: str | ActFormat) -> Model:
    """The model whose block linears all quantize their input, in a dynamic activation format. Raises `InputError` for
    unknown and static formats, inputs without whole groups, and linears whose input is quantized already."""
    act = get_act(act) if isinstance(act, str) else act
    flat = dict(trees.items(model.params))
    for i in range(model.config.num_layers):
        for name, (_, length) in model.config.linear_shapes().items():
            path = f"model.layers.{i}.{name}"
            leaf = flat[path] if isinstance(flat[path], PreparedInput) else PreparedInput(flat[path])
            if leaf.act is not None:
                raise InputError(
                    f"{path} quantizes its input already, to {leaf.act.name} (allowed: inputs as they are)"
                )
            act.check((length,))
            flat[path] = dataclasses.replace(leaf, act=act)
    return model.replace(params=trees.build(flat))


@partial(jax.jit, static_argnames=("config", "dtype"))
def _logits(params: Tree, tokens_BT: Array, config: ModelConfig, dtype: Any) -> Array:
    return forward(params, tokens_BT, config, dtype=dtype)

"""A Flax NNX face: the decoder as an `nnx.Module` whose parameters are our tree, leaf for leaf."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import RematPolicy, forward
from lowbit.models.model import Model
from lowbit.tree import Tree


class Decoder(nnx.Module):
    """`__call__(tokens) -> logits` over `nnx.Param`s, one for each leaf of the tree (a packed weight is one `Param`).

    Works with `nnx.jit`, `nnx.grad`, `nnx.split` and `nnx.Optimizer`; `params()` gives the tree back.
    """

    def __init__(self, config: ModelConfig, params: Tree):
        self.config = config
        self.flat = nnx.Dict({path: nnx.Param(leaf) for path, leaf in trees.items(params)})

    def params(self) -> Tree:
        """The parameter tree, as every other part of lowbit takes it."""
        return trees.build({path: self.flat[path].get_value() for path in self.config.shapes()})

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        remat: RematPolicy = "none",
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B T V"]:
        """Float32 logits; see `lowbit.models.decoder.forward`."""
        return forward(self.params(), tokens_BT, self.config, segments_BT=segments_BT, remat=remat, dtype=dtype)


def to_nnx(model: Model) -> Decoder:
    """The module of a model; shares its arrays."""
    return Decoder(model.config, model.params)


def from_nnx(module: Decoder, model: Model | None = None) -> Model:
    """The model of a module; tokenizer, source and meta come from `model` if it is given."""
    params = module.params()
    return Model(module.config, params) if model is None else model.replace(config=module.config, params=params)

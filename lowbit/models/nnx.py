"""The Flax NNX face: our decoder as an `nnx.Module`, and plans applied to the state of *any* NNX model.

The decoder's parameters are our tree, leaf for leaf (`to_nnx`, `from_nnx`). Any other module is split by `nnx.split`;
`assign` resolves a plan over its state, `fake_quantize` puts it on the grid inside a loss (straight-through), and
`quantize` gives the packed weights that the trained state decodes to, bit for bit:

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    assignment = assign(params, Plan((Rule(r".*kernel", "int4:g64"),)))
    loss = lambda params, x: f(nnx.merge(graph, fake_quantize(params, assignment), rest)(x))
    packed = quantize(trained, assignment)  # {path: QTensor}
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Latent, QTensor
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import RematPolicy, forward
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.tree import Tree

State = Any  # an nnx.State; as an annotation its own type parameter is a hint that is deprecated
INPUT_FIRST = re.compile(r"(.*\.)?kernel")  # flax keeps the kernels of its linears `[in, out]`


class Decoder(nnx.Module):
    """`__call__(tokens) -> logits` over `nnx.Param`s, one for each weight of the tree (a packed one is one `Param`;
    cache sites are plain `nnx.Variable`s, which nothing trains).

    Works with `nnx.jit`, `nnx.grad`, `nnx.split` and `nnx.Optimizer`; `params()` gives the tree back.
    """

    def __init__(self, config: ModelConfig, params: Tree):
        self.config = config
        leaves = dict(trees.items(params))
        self.flat = nnx.Dict({p: nnx.Param(leaf) for p, leaf in leaves.items() if not isinstance(leaf, CacheSite)})
        self.caches = nnx.Dict({p: nnx.Variable(leaf) for p, leaf in leaves.items() if isinstance(leaf, CacheSite)})

    def params(self) -> Tree:
        """The parameter tree, as every other part of lowbit takes it."""
        flat = {path: self.flat[path].get_value() for path in self.config.shapes()}
        return trees.build(flat | {path: site.get_value() for path, site in self.caches.items()})

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


# -- any NNX model ----------------------------------------------------------------------------------------------------


def assign(state: State, plan: Plan, input_first: str | re.Pattern[str] = INPUT_FIRST) -> dict[str, Format]:
    """`{path: format}` of the two-dimensional parameters of a state that `plan` quantizes.

    Paths join the keys with dots (`layers.0.kernel`). Formats see `[out, in]`: parameters whose path `input_first`
    matches whole are `[in, out]` and turned around (flax's kernels), any other is taken as it is (flax's embeddings).
    Raises `InputError` on what `Plan.resolve` refuses and on rules for inputs, whose sites only our decoder has.
    """
    shapes = {}
    for path, leaf in _flat(state).items():
        shape = tuple(leaf.shape)
        shapes[path] = shape[::-1] if len(shape) == 2 and re.fullmatch(input_first, path) else shape
    found = plan.resolve(shapes)
    if others := [site for site, fmt in found.items() if not isinstance(fmt, Format)]:
        raise InputError(f"format {found[others[0]].name} for {others[0]!r} of an NNX state (allowed: weights only)")
    return found


def fake_quantize(
    state: State, assignment: Mapping[str, Format], input_first: str | re.Pattern[str] = INPUT_FIRST
) -> State:
    """The state with assigned weights on their grid, in their own dtype; gradients pass by the format's clip policy."""
    return _map(state, assignment, input_first, lambda fmt, w_OI: Latent(w_OI, {}, fmt).value())


def quantize(
    state: State, assignment: Mapping[str, Format], input_first: str | re.Pattern[str] = INPUT_FIRST
) -> dict[str, QTensor]:
    """Packed assigned weights, `[out, in]`. Raises `InputError` on values that a format cannot hold."""
    out: dict[str, QTensor] = {}
    for path, leaf in _flat(state).items():
        if (fmt := assignment.get(path)) is not None:
            w_OI = _turned(path, leaf.get_value(), input_first)
            try:
                fmt.check_values(w_OI, fmt.init(w_OI))
            except InputError as e:
                raise InputError(f"{path}: {e}") from e
            out[path] = jax.jit(Latent(w_OI, {}, fmt).encode)()
    return out


def dequantize(state: State, packed: Mapping[str, QTensor], input_first: str | re.Pattern[str] = INPUT_FIRST) -> State:
    """The state with packed weights decoded into their places."""
    return _map(state, packed, input_first, lambda q, w_OI: q.decode().astype(w_OI.dtype))


def _map(state: State, found: Mapping[str, Any], input_first: Any, f: Callable[[Any, Array], Array]) -> State:
    flat = _flat(state)
    for path in found:
        if path not in flat:
            raise InputError(f"no parameter {path!r} in the state (there are {len(flat)})")

    def one(keys: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        path = ".".join(map(str, keys))
        if path not in found:
            return leaf
        w_OI = _turned(path, leaf.get_value(), input_first)
        return leaf.replace(_turned(path, f(found[path], w_OI), input_first))

    return nnx.map_state(one, state)


def _turned(path: str, w: Array, input_first: Any) -> Array:
    return rearrange(w, "i o -> o i") if re.fullmatch(input_first, path) else w


def _flat(state: State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, keys)): leaf for keys, leaf in nnx.to_flat_state(state)}

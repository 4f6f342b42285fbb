"""Calibration: what the linears of a model see on a text, one block of layers in memory at a time.

Rows of tokens are embedded and go through the decoder layer by layer. Of a layer's inputs only sums are kept: Hessians
`H = 2/n sum x x^T` for GPTQ, or maxima and mean squares per channel for scales. Memory: one layer, one batch of rows
inside of it, and the activations between layers (rows x length x hidden x 4 bytes, on the host).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.data.rows import permute
from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot.api import dense
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import block, embed
from lowbit.models.model import Model
from lowbit.tree import Tree

BATCH = 8
CONTEXT = 2048  # tokens of a row, unless the model has fewer positions
Readers = Mapping[str, Callable[[], Any]]  # {path: function that reads the leaf}
# Linears that multiply the same vectors, in the order in which a layer needs them.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class InputStats(NamedTuple):
    """Of one linear's input, as it multiplies it, over all calibration tokens; float32."""

    low_I: Float[np.ndarray, " I"]  # least value of each channel
    high_I: Float[np.ndarray, " I"]
    mean_square_I: Float[np.ndarray, " I"]
    absmean_I: Float[np.ndarray, " I"]  # mean magnitude

    @property
    def absmax_I(self) -> Float[np.ndarray, " I"]:
        """Largest magnitude of each channel."""
        return np.maximum(self.high_I, -self.low_I)


def tokenize(
    documents: Iterable[str], tokenizer: Any, rows: int, length: int, seed: int = 0, least: int | None = None
) -> Int[np.ndarray, "_ length"]:
    """`rows` of `length` tokens, drawn without replacement from the text cut into rows; with `least`, as many as there
    are if at least so many.

    Every document starts with BOS if the tokenizer adds it and ends with EOS if there is one, as in
    `lowbit.data.rows`. Raises `InputError` for a text that is too short, and without a tokenizer.
    """
    if tokenizer is None:
        raise InputError("calibration of a model without tokenizer (allowed: a model with one)")
    eos = list(tokenizer.eos_ids[:1])
    flat = np.asarray([i for doc in documents if doc.strip() for i in tokenizer.encode(doc) + eos], np.int32)
    there = len(flat) // length
    wanted = rows if least is None else least
    if there < wanted:
        raise InputError(
            f"calibration text has {len(flat)} tokens, {there} rows of {length} "
            f"(needed: {wanted * length} tokens for {wanted} rows; a longer text, fewer rows or a smaller length)"
        )
    chosen = permute(np.arange(min(rows, there)), there, seed, 0)
    return flat[: there * length].reshape(there, length)[chosen]


class Stream:
    """The activations that enter a layer, batch by batch; `advance` takes them through it."""

    def __init__(self, config: ModelConfig, tokens_BT: Int[np.ndarray, "B T"], batch: int = BATCH):
        if tokens_BT.shape[1] > config.max_position:
            raise InputError(
                f"calibration length {tokens_BT.shape[1]} (the model's max_position_embeddings is "
                f"{config.max_position})"
            )
        if (top := int(tokens_BT.max(initial=0))) >= config.vocab_size:
            raise InputError(f"tokenizer gives id {top} (allowed: below the vocabulary, {config.vocab_size})")
        self.config, self.tokens = config, tokens_BT.size
        self._tokens = [tokens_BT[i : i + batch] for i in range(0, len(tokens_BT), batch)]
        self._x: list[np.ndarray] = []

    def start(self, embed_tokens: Any) -> None:
        """Embeds the tokens; the leaf may be packed."""
        tree = {"model": {"embed_tokens": embed_tokens}}
        self._x = [np.asarray(_embed(tree, jnp.asarray(t), self.config)) for t in self._tokens]

    def take(self, rows: Sequence[int]) -> Float[np.ndarray, "n T D"]:
        """The activations of some rows, in this order."""
        size = len(self._tokens[0])
        return np.stack([self._x[r // size][r % size] for r in rows])

    def hessians(
        self, layer: Tree, index: int, names: Sequence[str], dtype: Any = np.float32
    ) -> dict[str, Float[np.ndarray | Array, "I I"]]:
        """`2/n sum x x^T` of the inputs of these linears of a layer, accumulated in float32, or in float64 on the host.

        Raises `InputError` naming the linear when an input is not finite.
        """
        sums: dict[str, Any] = {}
        for x in self._x:
            if np.dtype(dtype) == np.float64:
                for name, a in _inputs(self.config, layer, jnp.asarray(x), index, tuple(names)).items():
                    wide = np.asarray(a, np.float64).reshape(-1, a.shape[-1])
                    sums[name] = sums.get(name, 0.0) + wide.T @ wide
            else:
                sums = _add_squares(self.config, layer, jnp.asarray(x), index, tuple(names), sums)
        for name, total in sums.items():
            if not bool(np.isfinite(np.diagonal(total)).all()):
                raise InputError(_not_finite(index, name))
        return {name: total * (2.0 / self.tokens) for name, total in sums.items()}

    def stats(self, layer: Tree, index: int, names: Sequence[str]) -> dict[str, InputStats]:
        """Magnitudes of the inputs of these linears of a layer. Raises `InputError` as `hessians` does."""
        found: dict[str, tuple[np.ndarray, ...]] = {}
        for x in self._x:
            for name, new in _magnitudes(self.config, layer, jnp.asarray(x), index, tuple(names)).items():
                low, high, *sums = (np.asarray(a, np.float64) for a in new)
                if name in found:
                    a, b, *before = found[name]
                    low, high, sums = np.minimum(a, low), np.maximum(b, high), [s + t for s, t in zip(before, sums)]
                found[name] = low, high, *sums
        for name, arrays in found.items():
            if not all(np.isfinite(a).all() for a in arrays):
                raise InputError(_not_finite(index, name))
        means = {n: (low, high, *(s / self.tokens for s in sums)) for n, (low, high, *sums) in found.items()}
        return {n: InputStats(*(a.astype(np.float32) for a in arrays)) for n, arrays in means.items()}

    def advance(self, layer: Tree, index: int) -> None:
        """Replaces the activations by what the layer makes of them. Raises `InputError` when that is not finite."""
        for i, x in enumerate(self._x):
            self._x[i] = np.asarray(_output(self.config, layer, jnp.asarray(x), index))
            if not np.isfinite(self._x[i]).all():
                raise InputError(f"calibration: the output of model.layers.{index} is not finite (allowed: finite)")


def working(layer: Tree, acts: bool = True) -> Tree:
    """A layer for the stream: its weights decoded and in float32, so that any mix of formats is one program. Without
    `acts` its activation formats (and cache formats) are left out; online transforms of inputs stay."""
    flat = {}
    for path, leaf in trees.items(layer):
        if isinstance(leaf, PreparedInput):
            w = _float32(leaf.w)
            flat[path] = PreparedInput(w, leaf.act, leaf.op, leaf.params) if acts else PreparedInput(w, op=leaf.op)
        elif isinstance(leaf, np.ndarray | jax.Array | QTensor | Latent | Coded | Adapter):
            flat[path] = _float32(leaf)
        elif acts:
            flat[path] = leaf
    return trees.build(flat)


def _float32(w: Any) -> Array:
    return jnp.asarray(dense(w) if isinstance(w, QTensor | Latent | Coded | Adapter) else w, jnp.float32)


def linears(config: ModelConfig) -> dict[str, str]:
    """`{last part of the name: path inside of the layer}` of a layer's linears."""
    return {path.rpartition(".")[2]: path for path in config.linear_shapes()}


def read_layer(read: Readers, index: int) -> Tree:
    """The tree of one layer."""
    prefix = f"model.layers.{index}."
    return trees.build({p.removeprefix(prefix): f() for p, f in read.items() if p.startswith(prefix)})


def length_of(config: ModelConfig, length: int = 0) -> int:
    """Tokens of a calibration row: `length`, or for 0 the model's context, 2048 at most."""
    return length or min(CONTEXT, config.max_position)


def statistics(
    config: ModelConfig, read: Readers, tokens_BT: Int[np.ndarray, "B T"], batch: int = BATCH
) -> dict[str, InputStats]:
    """`{path: InputStats}` of every linear inside the layers of a model whose leaves `read` gives, one layer at a time.

    Raises `InputError` for activations that are not finite, naming the linear.
    """
    stream, out = Stream(config, tokens_BT, batch), {}
    stream.start(read["model.embed_tokens"]())
    names = linears(config)
    for i in range(config.num_layers):
        layer = working(read_layer(read, i))
        out |= {f"model.layers.{i}.{names[n]}": s for n, s in stream.stats(layer, i, tuple(names)).items()}
        if i + 1 < config.num_layers:
            stream.advance(layer, i)
    return out


def model_statistics(
    model: Model, documents: Iterable[str], rows: int = 128, length: int = 0, seed: int = 0
) -> dict[str, InputStats]:
    """`statistics` of a model in memory on a text (see `tokenize` and `length_of`)."""
    tokens = tokenize(documents, model.tokenizer, rows, length_of(model.config, length), seed)
    return statistics(model.config, readers_of(model.params), tokens)


def readers_of(params: Tree) -> Readers:
    """The leaves of a tree as functions, as `lowbit.models.hf.readers` gives those of a folder."""
    return {path: partial(_identity, leaf) for path, leaf in trees.items(params)}


def _identity(leaf: Any) -> Any:
    return leaf


def _not_finite(index: int, name: str) -> str:
    return f"calibration: the input of {name} in model.layers.{index} is not finite (allowed: finite activations)"


@partial(jax.jit, static_argnames="config")
def _embed(tree: Tree, tokens_BT: Array, config: ModelConfig) -> Array:
    return embed(tree, tokens_BT, config, jnp.float32)


# What is not asked for is not computed: the compiler drops it.


@partial(jax.jit, static_argnames=("config", "names"))
def _inputs(config: ModelConfig, layer: Tree, x_BTD: Array, index: Any, names: tuple[str, ...]) -> dict[str, Array]:
    found = block(config, layer, x_BTD, jnp.asarray(index, jnp.int32))[1]
    return {name: found[name] for name in names}


@partial(jax.jit, static_argnames=("config", "names"), donate_argnums=(5,))
def _add_squares(
    config: ModelConfig, layer: Tree, x_BTD: Array, index: Any, names: tuple[str, ...], sums: dict[str, Array]
) -> dict[str, Array]:
    out = {}
    for name, a in _inputs(config, layer, x_BTD, index, names).items():
        square = jnp.einsum("bti,btj->ij", a, a, precision=jax.lax.Precision.HIGHEST)
        out[name] = sums[name] + square if name in sums else square
    return out


@partial(jax.jit, static_argnames=("config", "names"))
def _magnitudes(
    config: ModelConfig, layer: Tree, x_BTD: Array, index: Any, names: tuple[str, ...]
) -> dict[str, tuple[Array, Array, Array, Array]]:
    found = _inputs(config, layer, x_BTD, index, names)
    tokens = (0, 1)

    def of(a: Array) -> tuple[Array, Array, Array, Array]:
        return a.min(tokens), a.max(tokens), jnp.sum(jnp.square(a), axis=tokens), jnp.sum(jnp.abs(a), axis=tokens)

    return {n: of(a) for n, a in found.items()}


@partial(jax.jit, static_argnames="config")
def _output(config: ModelConfig, layer: Tree, x_BTD: Array, index: Any) -> Array:
    return block(config, layer, x_BTD, jnp.asarray(index, jnp.int32))[0]

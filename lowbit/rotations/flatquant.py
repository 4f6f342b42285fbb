"""FlatQuant: learned affine transforms, a Kronecker product of two small matrices for each group of linears
(Sun et al. 2024, arXiv 2410.09426).

The input x of a group (q, k, v | o | gate, up | down) becomes `P x` with `P = left (x) right`, the weights `W P^-1`.
Both matrices are learned, with a diagonal before them, which is folded into the norm or the `up_proj` before the group.
One layer at a time is trained, to least squares between the output of the quantized layer and that of the original one,
both on the original activations. P is any invertible matrix; it starts orthogonal (Hadamard or DCT factors).

K keeps QuaRot's fixed rotation after RoPE. Clipping is the formats' own (`int4:token:r0.9`, `int4:mse`). Names:
`flatquant`; `:steps150` a layer, `:lr0.005`, `:b4` rows a step, `:n64` rows of calibration text, `:s0`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.linalg import hadamard
from lowbit.linalg.online import Kronecker
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import block, embed
from lowbit.models.model import Model
from lowbit.ptq import calibrate
from lowbit.rotations import quarot
from lowbit.rotations.base import Transform, no_more, number_of, register
from lowbit.rotations.fold import State, check_norms, fold_tree
from lowbit.rotations.learn import Progress, as_jax, default_assignment, dress, finite
from lowbit.rotations.smoothquant import scales
from lowbit.tree import Tree

SITES = {  # group: where its diagonal goes, and the linears that read it
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": (None, ("self_attn.o_proj",)),
    "up": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ("mlp.down_proj", ("mlp.down_proj",)),
}
ALPHA = 0.3  # of the SmoothQuant scales that diagonals start from
OnStep = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the training: AdamW with a cosine schedule for each layer; `length` of a row is the model's context by
    default, 2048 at most."""

    steps: int = 150
    lr: float = 5e-3
    batch: int = 4
    rows: int = 64
    length: int | None = None
    seed: int = 0


def fit(
    model: Model,
    documents: Sequence[str] | None = None,
    assignment: Mapping[str, Any] | None = None,
    *,
    name: str = "flatquant",
    options: Options = Options(),
    on_step: OnStep | None = None,
    progress: str | Path | None = None,
) -> State:
    """Learns the transforms for a model that will be quantized by `assignment` (W4A4 without one).

    `on_step(step, steps, loss)` counts steps over all layers; the loss is the squared error over that of a layer that
    does nothing. With a path `progress`, the same call goes on behind the last whole layer after an interruption.
    Raises `InputError` for models without norms before their linears, for a text with too few rows, and when the loss
    is no longer finite.
    """
    c, o = model.config, options
    check_norms(c)
    if not c.input_norm:
        raise InputError(f"flatquant of {model.source or 'a model'}, which has no norm before its linears")
    assignment = default_assignment(c) if assignment is None else assignment
    length = min(o.length or calibrate.CONTEXT, c.max_position)
    tokens = calibrate.tokenize(documents or (), model.tokenizer, o.rows, length, o.seed)
    stats = calibrate.statistics(c, calibrate.readers_of(model.params), tokens)
    start = scales(model, {p: s.absmax_I for p, s in stats.items()}, ALPHA, everywhere=True)
    x = _embed({"model": {"embed_tokens": model.params["model"]["embed_tokens"]}}, jnp.asarray(tokens), c)
    kept = Progress(progress, name, o, model, assignment, tokens)
    earlier = kept.load()
    done, found = (0, State(name)) if earlier is None else earlier
    smooth, inputs = dict(found.smooth), dict(found.inputs)
    train = _trainer(c, o, name)
    for i in range(c.num_layers):
        layer = as_jax(model.params["model"]["layers"][str(i)])
        y = jnp.concatenate([_run(c, layer, x[j : j + o.batch], i) for j in range(0, len(x), o.batch)])
        if i < done:
            x = y
            continue
        prefix = f"model.layers.{i}."
        own = {s.removeprefix(prefix): f for s, f in assignment.items() if s.startswith(prefix)}
        begin = {"log_scale": {}, "ops": {}}
        for group, (site, names) in sites(c).items():
            if site is not None:
                begin["log_scale"][site] = jnp.asarray(np.log(start[prefix + site]), jnp.float32)
            begin["ops"][group] = initial(c.linear_shapes()[names[0]][1], c.head_dim if group == "o" else None)
        learned = train(i, layer, x, y, begin, own, on_step)
        s, ops = _state(c, i, jax.tree.map(lambda a: np.asarray(a, np.float64), learned), np.exp)
        smooth |= s
        inputs |= {p: Kronecker(*(m.astype(np.float32) for m in (op.left, op.right))) for p, op in ops.items()}
        x = y
        kept.save(i + 1, State(name, smooth=smooth, inputs=inputs))
    return State(name, smooth=smooth, inputs=inputs, caches=quarot.r3(c, "dct"))


def sites(c: ModelConfig) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """`SITES` with the names that the family has."""
    found = dict(SITES)
    if c.sandwich_norm:
        found["up"] = ("pre_feedforward_layernorm", found["up"][1])
    return found


def initial(length: int, head_dim: int | None = None) -> Kronecker:
    """An orthogonal start for vectors of this length: heads x head dimension for `o_proj`, else the two factors that
    are nearest to each other."""
    right = head_dim or next(d for d in range(math.isqrt(length), 0, -1) if length % d == 0)
    return Kronecker(
        *(jnp.asarray(hadamard.transform(n, "dct").dense(), jnp.float32) for n in (length // right, right))
    )


def _state(c: ModelConfig, index: int, learned: Any, exp: Any) -> tuple[dict[str, Any], dict[str, Kronecker]]:
    """`smooth` and `inputs` of one layer by full path."""
    prefix = f"model.layers.{index}."
    smooth = {prefix + site: exp(v) for site, v in learned["log_scale"].items()}
    ops = {prefix + n: learned["ops"][g] for g, (_, names) in sites(c).items() for n in names}
    return smooth, ops


def _transformed(c: ModelConfig, layer: Tree, learned: Any) -> Tree:
    """One layer after its transforms, in jax."""
    prefix = "model.layers.0."  # which layer it is makes no difference to the folding
    smooth, ops = _state(c, 0, learned, jnp.exp)
    state = State("", smooth=smooth, inputs=ops)
    flat = dict(trees.items(layer))
    out = fold_tree({prefix + p: partial(flat.get, p) for p in flat if not isinstance(flat[p], CacheSite)}, c, state)
    return trees.build(flat | {p.removeprefix(prefix): leaf for p, leaf in out.items()})


def _trainer(c: ModelConfig, o: Options, name: str) -> Callable[..., Any]:
    """`train(index, layer, x, y, start, assignment, on_step)`; layers with equal assignments share one program."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(o.lr, o.steps), weight_decay=0.0)

    def objective(learned: Any, layer: Tree, x_BTD: Array, y_BTD: Array, index: Any, assignment: Any) -> Array:
        quantized = dress(_transformed(c, layer, learned), dict(assignment))
        out, _ = block(c, quantized, x_BTD, jnp.asarray(index, jnp.int32))
        return jnp.mean(jnp.square(out - y_BTD)) / jnp.mean(jnp.square(y_BTD - x_BTD))

    @partial(jax.jit, static_argnames="assignment")
    def step(
        learned: Any, state: Any, layer: Tree, x_BTD: Array, y_BTD: Array, index: Any, assignment: Any
    ) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(objective)(learned, layer, x_BTD, y_BTD, index, assignment)
        updates, state = optimizer.update(grads, state, learned)
        return optax.apply_updates(learned, updates), state, loss

    def train(index: int, layer: Tree, x: Array, y: Array, start: Any, assignment: Any, on_step: OnStep | None) -> Any:
        learned, state = start, optimizer.init(start)
        rng = np.random.default_rng([o.seed, index])
        order = np.concatenate([rng.permutation(len(x)) for _ in range(-(-o.steps * o.batch // len(x)))])
        for k in range(o.steps):
            rows = order[k * o.batch : (k + 1) * o.batch]
            learned, state, loss = step(learned, state, layer, x[rows], y[rows], index, tuple(assignment.items()))
            value = finite(loss, k, f"{name}, layer {index}")
            if on_step is not None:
                on_step(index * o.steps + k + 1, c.num_layers * o.steps, value)
        return learned

    return train


@partial(jax.jit, static_argnames="config")
def _embed(tree: Tree, tokens_BT: Array, config: ModelConfig) -> Float[Array, "B T D"]:
    return embed(tree, tokens_BT, config, jnp.float32)


@partial(jax.jit, static_argnames="config")
def _run(config: ModelConfig, layer: Tree, x_BTD: Array, index: Any) -> Float[Array, "B T D"]:
    return block(config, layer, x_BTD, jnp.asarray(index, jnp.int32))[0]


def _parse(name: str, keys: list[str]) -> Transform:
    steps = number_of(name, keys, "steps", 150, 1, 10**6)
    rate = number_of(name, keys, "lr", 5e-3, 0.0, 1.0)
    batch = number_of(name, keys, "b", 4, 1, 4096)
    rows = number_of(name, keys, "n", 64, 1, 10**6)
    length = number_of(name, keys, "len", 0, 8, 10**6) or None
    seed = number_of(name, keys, "s", 0, 0, 2**31 - 1)
    no_more(name, keys, ["steps150", "lr0.005", "b4", "n64", "len512", "s0"])
    options = Options(steps, rate, batch, rows, length, seed)
    return Transform(name, partial(fit, name=name, options=options), calibrates=True, learns=True)


register("flatquant", _parse, ["flatquant:steps2:b2:n4:len32"])

"""SpinQuant: the rotations are learned, on the manifold of orthogonal matrices (Liu et al. 2024, arXiv 2405.16406).

| part | what | where it goes |
|---|---|---|
| `r1` | the residual stream, one learned `[D, D]` | folded |
| `r2` | each value head of a layer, a learned `[Dh, Dh]` for each layer | folded |
| `r3`, `r4` | q and k after RoPE, the input of `down_proj`: fixed Hadamard | online |
| `across` | across heads before `o_proj`: QuaRot's fixed Hadamard, which the paper leaves out | online |

`spinquant` has r1 to r4 (the paper's `had`), `spinquant:r1+r2` stays without online transforms (`no_had`),
`spinquant:r1+r2+r3+r4+across` starts where QuaRot is. R starts as a random Hadamard matrix; the loss is that of the
network whose inputs and caches are quantized as the plan says, its own weights frozen and, as the paper advises where
GPTQ follows, in full precision (`:w` quantizes them too). Cayley SGD with a cosine schedule: `:steps100`, `:lr1.5`,
`:b8` rows a step. The loss is the KL divergence to the model itself; `:ce` takes the paper's cross entropy of the next
token.
"""

import dataclasses
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
from lowbit.errors import InputError, unknown
from lowbit.linalg import hadamard
from lowbit.linalg.cayley import cayley_sgd
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.models.model import Model
from lowbit.rotations import quarot
from lowbit.rotations.base import Transform, no_more, number_of, parts_of, register
from lowbit.rotations.fold import State, apply, caches, check_norms, check_residual, fold, fold_tree
from lowbit.rotations.learn import Progress, activations_only, as_jax, batches, default_assignment, dress, finite
from lowbit.tree import Tree

PARTS = ("r1", "r2", "r3", "r4", "across")
LOSSES = ("kl", "ce")
SAVE_EVERY = 10
OnStep = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How rotations are learned. `length` of a row is the model's context by default, 2048 at most; `weights` says
    whether weights are quantized while learning, `weight_lr` trains them too (AdamW), jointly with the rotations."""

    parts: tuple[str, ...] = PARTS[:4]
    steps: int = 100
    lr: float = 1.5
    batch: int = 8
    length: int | None = None
    weights: bool = False
    weight_lr: float = 0.0
    loss: str = "kl"
    fallback: str = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `InputError` for a part or a loss that there is not."""
        if wrong := [p for p in self.parts if p not in PARTS]:
            raise unknown("part of spinquant", wrong[0], PARTS)
        if self.loss not in LOSSES:
            raise unknown("loss of spinquant", self.loss, LOSSES)


def fit(
    model: Model,
    documents: Sequence[str] | None = None,
    assignment: Mapping[str, Any] | None = None,
    *,
    name: str = "spinquant",
    options: Options = Options(),
    on_step: OnStep | None = None,
    progress: str | Path | None = None,
) -> State:
    """Learns the rotations for a model whose inputs and caches will be quantized by `assignment` (W4A4 without one).

    `on_step(step, steps, loss)` is called after each. With a path `progress`, the same call goes on after an
    interruption, to the same bits. Raises `InputError` for R1 of a model with sandwich norms, for sizes without a
    Hadamard matrix, for a text that fills no batch, and when the loss is no longer finite.
    """
    return learn(model, documents or (), assignment, name, options, on_step, progress)[0]


def learn(
    model: Model,
    documents: Sequence[str],
    assignment: Mapping[str, Any] | None = None,
    name: str = "spinquant",
    options: Options = Options(),
    on_step: OnStep | None = None,
    progress: str | Path | None = None,
) -> tuple[State, Model]:
    """`(state, transformed model)` after learning; with `weight_lr` the weights of the model are trained ones, so it
    is another function than `fold.apply(model, state)`.

    The model is float: put the plan on it with a solver, or with `Latent`s as the next recipe's start. `progress` keeps
    rotations only, so it cannot go together with `weight_lr` (`InputError`).
    """
    check_norms(model.config)
    c, o = model.config, options
    if o.weight_lr and progress is not None:
        raise InputError(f"transform {name}: progress with weight_lr {o.weight_lr} (allowed: one of the two)")
    assignment = default_assignment(c) if assignment is None else assignment
    target = dict(assignment) if o.weights or o.weight_lr else activations_only(assignment)
    fixed, start = initial(c, name, o)
    tokens = batches(model, documents, o.steps, o.batch, o.length, o.seed)
    plain, config = fold(model.params, c, State(name, norms="r1" in o.parts))
    teacher = as_jax(model.params) if o.loss == "kl" else None
    trainable: dict[str, Any] = {"rotations": start} | ({"weights": as_jax(plain)} if o.weight_lr else {})
    frozen = None if o.weight_lr else as_jax(plain)
    rate = optax.cosine_decay_schedule(o.lr, o.steps)
    optimizer = optax.multi_transform(
        {"rotations": cayley_sgd(rate), "weights": optax.adamw(optax.cosine_decay_schedule(o.weight_lr, o.steps))},
        {k: k for k in trainable},
    )

    def network(trainable: dict[str, Any], frozen: Tree | None) -> Tree:
        return dress(rotate(trainable.get("weights", frozen), config, fixed, trainable["rotations"]), target)

    def objective(trainable: dict[str, Any], frozen: Tree | None, teacher: Tree | None, tokens_BT: Array) -> Array:
        logits = forward(network(trainable, frozen), tokens_BT[:, :-1], config)
        if teacher is None:
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:]).mean()
        goal = jax.nn.log_softmax(forward(teacher, tokens_BT[:, :-1], c))
        return jnp.mean(jnp.sum(jnp.exp(goal) * (goal - jax.nn.log_softmax(logits)), axis=-1))

    @partial(jax.jit, donate_argnums=0)
    def step(trainable: Any, state: Any, frozen: Any, teacher: Any, tokens_BT: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(objective)(trainable, frozen, teacher, tokens_BT)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    kept = Progress(progress, name, o, model, target, tokens)
    done = 0
    if (earlier := kept.load()) is not None:
        done, found = earlier
        trainable["rotations"] = {k: jnp.asarray(v, jnp.float32) for k, v in _raw(found).items()}
    state = optimizer.init(trainable)
    if done:
        state = optax.tree.set(state, count=jnp.asarray(done, jnp.int32))
    for i, rows in enumerate(tokens[done:], done):
        trainable, state, loss = step(trainable, state, frozen, teacher, jnp.asarray(rows))
        value = finite(loss, i, name)
        if on_step is not None:
            on_step(i + 1, o.steps, value)
        if (i + 1) % SAVE_EVERY == 0:
            r2 = trainable["rotations"].get("r2")
            heads = {} if r2 is None else dict(enumerate(np.asarray(r2)))
            kept.save(i + 1, State("", residual=trainable["rotations"].get("r1"), heads=heads))
    learned = finished(fixed, trainable["rotations"], "r1" in o.parts)
    # Folding norms again, which are one now, changes nothing.
    return learned, apply(model.replace(params=trainable.get("weights", plain), config=config), learned)


def initial(c: ModelConfig, name: str, o: Options) -> tuple[State, dict[str, Any]]:
    """What stays as it is, and the rotations that learning starts from: `{"r1": [D, D], "r2": [L, Dh, Dh]}`."""
    start: dict[str, Any] = {}
    keys = jax.random.split(jax.random.key(o.seed), c.num_layers + 1)
    if "r1" in o.parts:
        check_residual(c, "; allowed: spinquant:r2+r3+r4")
        with quarot.naming(f"hidden size {c.hidden_size}"):
            start["r1"] = jnp.asarray(hadamard.randomized(c.hidden_size, keys[-1], o.fallback), jnp.float32)
    if "r2" in o.parts:
        with quarot.naming(f"head dimension {c.head_dim}"):
            heads = [hadamard.randomized(c.head_dim, k, o.fallback) for k in keys[: c.num_layers]]
        start["r2"] = jnp.asarray(np.stack(heads), jnp.float32)
    if not start:
        raise InputError(f"transform {name} learns nothing (allowed: with r1, r2 or both)")
    inputs = quarot.r4(c, o.fallback) if "r4" in o.parts else {}
    inputs |= quarot.across(c, o.fallback) if "across" in o.parts else {}
    caches = quarot.r3(c, o.fallback) if "r3" in o.parts else {}
    return State(name, inputs=inputs, caches=caches), start


def _raw(state: State) -> dict[str, np.ndarray]:
    """The rotations of a state that learning was interrupted at, as `initial` gives those it starts from."""
    out = {} if state.residual is None else {"r1": state.residual}
    return out | ({"r2": np.stack([state.heads[i] for i in sorted(state.heads)])} if state.heads else {})


def rotate(params: Tree, config: ModelConfig, fixed: State, rotations: Mapping[str, Float[Array, "..."]]) -> Tree:
    """The tree after `fixed` and the rotations, in jax, differentiable. Norms must have been folded if there is R1."""
    r2 = rotations.get("r2")
    heads = {} if r2 is None else {i: r2[i] for i in range(config.num_layers)}
    state = dataclasses.replace(fixed, residual=rotations.get("r1"), heads=heads)
    flat = dict(trees.items(params))
    leaves = {p: partial(flat.get, p) for p in config.shapes()}
    with jax.default_matmul_precision("highest"):
        return trees.build(fold_tree(leaves, config, state) | caches(flat, state))


def finished(fixed: State, rotations: Mapping[str, Any], norms: bool) -> State:
    """The state with the learned rotations in float64, made orthogonal to the last bit by their polar factors."""
    r2 = rotations.get("r2")
    heads = {} if r2 is None else {i: polar(r) for i, r in enumerate(np.asarray(r2))}
    residual = polar(np.asarray(rotations["r1"])) if "r1" in rotations else None
    return dataclasses.replace(fixed, norms=norms, residual=residual, heads=heads)


def polar(r: np.ndarray) -> np.ndarray:
    """The orthogonal matrix nearest to `r`, in float64."""
    u, _, vt = np.linalg.svd(np.asarray(r, np.float64))
    return u @ vt


def _parse(name: str, keys: list[str]) -> Transform:
    parts, keys = parts_of(name, keys, PARTS, Options.parts)
    steps = number_of(name, keys, "steps", 100, 1, 10**6)
    rate = number_of(name, keys, "lr", 1.5, 0.0, 100.0)
    batch = number_of(name, keys, "b", 8, 1, 4096)
    length = number_of(name, keys, "len", 0, 8, 10**6) or None
    seed = number_of(name, keys, "s", 0, 0, 2**31 - 1)
    fallback, keys = quarot.fallback_of(name, keys)
    flags = {k: k in keys for k in ("w", "ce")}
    keys = [k for k in keys if k not in flags]
    no_more(name, keys, [*PARTS, *flags, *quarot.FALLBACKS, "steps100", "lr1.5", "b8", "len512", "s0"])
    options = Options(
        parts=tuple(parts),
        steps=steps,
        lr=rate,
        batch=batch,
        length=length,
        weights=flags["w"],
        loss="ce" if flags["ce"] else "kl",
        fallback=fallback,
        seed=seed,
    )
    return Transform(name, partial(fit, name=name, options=options), calibrates=True, learns=True)


register("spinquant", _parse, ["spinquant:r1+r2+r3+r4+across:steps3:b2:len32", "spinquant:r1+r2:w:ce:steps3:b2:len32"])

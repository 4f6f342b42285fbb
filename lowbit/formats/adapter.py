"""A frozen weight with a trained low-rank update beside it (LoRA, arXiv 2106.09685), as a leaf of the parameter tree.

    y = x w_hat^T + scaling * (x A^T) B^T

With `pool` = g the adapter sees sums of g neighbouring inputs, so that its update is one number for each row and group
of g columns (QA-LoRA, arXiv 2309.14717, Algorithm 1): `y = x w_hat^T + scaling * (pooled(x) A^T) B^T`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from lowbit.formats.base import FormatError
from lowbit.formats.fake_quant import PreparedInput

HIGHEST = jax.lax.Precision.HIGHEST
ARRAYS = ("lora_a", "lora_b")  # as checkpoints and folders call A and B


@partial(jax.tree_util.register_dataclass, data_fields=["w", "a", "b"], meta_fields=["scaling", "pool"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The weight `w [O, I]` (an array, `QTensor` or `Latent`, which nothing trains) and the factors `a [r, I / pool]`
    and `b [O, r]`, float32 in training.

    What is done to the layer's input lies outside, in a `PreparedInput` around this leaf: weight and adapter see the
    same prepared input, and merging one into the other changes nothing. Raises `FormatError` for a weight that has an
    adapter already or that prepares its input.
    """

    w: Any
    a: Any  # float [*layers, r, I / pool]; not annotated so, as jax rebuilds the node with other things in place
    b: Any
    scaling: float = 1.0
    pool: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.w, Adapter | PreparedInput):
            kind = "an adapter already" if isinstance(self.w, Adapter) else "a prepared input"
            raise FormatError(f"adapter of a weight with {kind} (allowed: an array, packed or latent weight)")

    def low_rank(self, x_BTI: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The adapter's part of the product, in float32 at least; factors are used in `x`'s dtype."""
        dtype, acc = x_BTI.dtype, jnp.promote_types(x_BTI.dtype, jnp.float32)
        dot = partial(jnp.einsum, preferred_element_type=acc)
        if self.pool > 1:
            x_BTI = jnp.sum(rearrange(x_BTI, "... (g k) -> ... g k", k=self.pool), axis=-1, dtype=acc)
        h = dot("...i,ri->...r", x_BTI.astype(dtype), self.a.astype(dtype))
        return dot("...r,or->...o", h.astype(dtype), self.b.astype(dtype)) * jnp.asarray(self.scaling, acc)

    def delta(self) -> Float[Array, "O G"]:
        """`scaling * B A`, float32: what the adapter adds to each weight, or to all `pool` weights of a group."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return jnp.matmul(b, a, precision=HIGHEST) * jnp.float32(self.scaling)

    def update(self) -> Float[Array, "O I"]:
        """`delta` for every weight."""
        return repeat(self.delta(), "o g -> o (g k)", k=self.pool)


def bare(leaf: Any) -> Any:
    """The array, `QTensor` or `Latent` inside of a leaf."""
    while isinstance(leaf, Adapter | PreparedInput):
        leaf = leaf.w
    return leaf


def check(path: str, shape: tuple[int, ...], rank: int, pool: int = 1) -> None:
    """Raises `FormatError` unless a weight of this shape can have an adapter of this rank and pool."""
    if len(shape) != 2:
        raise FormatError(f"adapter of {path}, of shape {list(shape)} (allowed: matrices)")
    if shape[1] % pool:
        raise FormatError(f"adapter of {path}: groups of {pool} inputs of {shape[1]} (allowed: divisors)")
    most = min(shape[0], shape[1] // pool)
    if not 1 <= rank <= most:
        raise FormatError(f"adapter of {path}: rank {rank} for {shape[0]} x {shape[1] // pool} (allowed: 1 to {most})")


# -- as names and arrays, for checkpoints and folders -----------------------------------------------------------------


def describe(leaf: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """`{"rank", "scaling", "pool"}`, JSON-able, and the arrays `{"lora_a": a, "lora_b": b}`."""
    names = {"rank": int(leaf.b.shape[-1]), "scaling": float(leaf.scaling), "pool": int(leaf.pool)}
    return names, dict(zip(ARRAYS, (leaf.a, leaf.b)))


def described_shapes(path: str, names: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that `describe` gave for these names and a weight of this shape. Raises `FormatError`."""
    if set(names) != {"rank", "scaling", "pool"} or not all(isinstance(names[k], int) for k in ("rank", "pool")):
        raise FormatError(f"adapter of {path}: {names} (allowed: rank, scaling and pool, numbers)")
    if not isinstance(names["scaling"], int | float):
        raise FormatError(f"adapter of {path}: scaling {names['scaling']!r} (allowed: a number)")
    if names["pool"] < 1:
        raise FormatError(f"adapter of {path}: pool {names['pool']} (allowed: at least 1)")
    check(path, shape, names["rank"], names["pool"])
    return dict(zip(ARRAYS, ((names["rank"], shape[1] // names["pool"]), (shape[0], names["rank"]))))


def restore(w: Any, names: dict[str, Any] | None, arrays: dict[str, Any]) -> Any:
    """Inverse of `describe`: `w` with its adapter, or itself without names."""
    if not names:
        return w
    return Adapter(w, arrays["lora_a"], arrays["lora_b"], float(names["scaling"]), int(names["pool"]))

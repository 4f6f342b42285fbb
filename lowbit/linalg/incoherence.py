"""Incoherence: random signs and a Hadamard transform on both sides of a weight (QuIP#, arXiv 2402.04396, section 3).

    enter   W~ = T_O diag(1 / s_V) W diag(1 / s_U) T_I^T          leave   W = diag(s_V) T_O^T W~ T_I diag(s_U)

`T` is an orthonormal transform of `lowbit.linalg.hadamard`, `s_U` `[1, I]` and `s_V` `[O, 1]` are random signs. Entries
of `W~` then look like independent draws from a normal distribution, whatever W was: outliers are spread over rows and
columns. With signs, the transform is orthogonal: lengths and, with the Hessian taken along, the proxy loss stay. Sign
vectors that are trained become scales of rows and columns; `leave` undoes `enter` for these, too.

Both directions are sums in a fixed order (`Transform.sums`) with one rounded factor at the end, so eager, jitted and
sharded programs agree to the bit.
"""

import dataclasses
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit.linalg.hadamard import Transform, pinned, transform


@dataclasses.dataclass(frozen=True)
class Incoherence:
    """The transforms of a weight's rows (of length O, over its columns) and columns (of length I)."""

    rows: Transform
    columns: Transform

    def enter(
        self, w_OI: Float[Array, "O I"], su_1I: Float[Array, "1 I"], sv_O1: Float[Array, "O 1"]
    ) -> Float[Array, "O I"]:
        """The weight in the rotated space, float32."""
        y = self._sums((w_OI.astype(jnp.float32) / sv_O1) / su_1I, False)
        return pinned(y * self._scale)

    def leave(
        self, w_OI: Float[Array, "O I"], su_1I: Float[Array, "1 I"], sv_O1: Float[Array, "O 1"]
    ) -> Float[Array, "O I"]:
        """Inverse of `enter`."""
        y = self._sums(pinned(w_OI.astype(jnp.float32)), True)
        return pinned(pinned(y * self._scale) * sv_O1) * su_1I

    def hessian(self, H_II: Any, su_1I: Float[Array | np.ndarray, "1 I"]) -> Float[Array | np.ndarray, "I I"]:
        """`T_I diag(s_U) H diag(s_U) T_I^T`: what `H` is to inputs of the rotated weight. float64 numpy stays so."""
        return _both(self.columns, H_II, su_1I)

    def output_hessian(self, H_OO: Any, sv_O1: Float[Array | np.ndarray, "O 1"]) -> Float[Array | np.ndarray, "O O"]:
        """`T_O diag(s_V) H_O diag(s_V) T_O^T`, the same for the outputs' side."""
        return _both(self.rows, H_OO, sv_O1)

    @property
    def _scale(self) -> np.float32:
        return np.float32(1 / math.sqrt(self.rows.norm * self.columns.norm))

    def _sums(self, w_OI: Array, inverse: bool) -> Array:
        return self.columns.sums(self.rows.sums(w_OI, inverse).T, inverse).T


@cache
def incoherence(shape: tuple[int, int], block: int | None = None, fallback: str = "refuse") -> Incoherence:
    """The transforms for weights of a shape, of full width or on blocks of columns and rows; `fallback` as in
    `hadamard.transform`, and with a `block`: `blocks` takes the largest power of two that divides both it and the
    length. Raises `InputError` for lengths that have none."""
    parts = [math.gcd(n, block) if block and fallback == "blocks" else block for n in shape]
    return Incoherence(*(transform(n, fallback, part) for n, part in zip(shape, parts, strict=True)))


def signs(n: int, side: str, seed: int = 0, key: Any = None) -> Float[Array | np.ndarray, " n"]:
    """`n` random signs, +1.0 and -1.0 in float32, for the inputs' (`in`) or the outputs' side (`out`).

    They depend on length, side and seed alone: linears of the same input share their input's signs, so that it needs to
    be rotated once. With a `key` of jax they come from there.
    """
    if key is not None:
        return jax.random.rademacher(jax.random.fold_in(key, int(side == "out")), (n,), jnp.float32)
    return np.random.default_rng([seed, n, int(side == "out")]).choice(np.float32([-1, 1]), n)


def _both(t: Transform, H: Any, s: Any) -> Array | np.ndarray:
    host = isinstance(H, np.ndarray) and H.dtype == np.float64
    s = np.asarray(s, np.float64).reshape(-1) if host else jnp.reshape(jnp.asarray(s), (-1,))
    H = (H if host else jnp.asarray(H, jnp.float32)) * s[:, None] * s
    H = t(t(H).T)
    return (H + H.T) * (0.5 if host else np.float32(0.5))

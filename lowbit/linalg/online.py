"""Linear maps that stay in the forward pass: what is done to an activation where its transform cannot be folded away.

Every op maps the last axis of an array, is a pytree (its matrices are leaves, the rest is static), and has a `name`
that `get` parses back, so that checkpoints can hold it:

| name | y, for x of length `n * rest` |
|---|---|
| `hadamard:N` | the Hadamard transform of length N on each of the parts of N values (on all of x if N is its length) |
| `hadamard:N:across` | x as N rows: the transform over the rows (across the heads of an attention's output) |
| `dct:N`, `dct:N:across` | the same where no Hadamard matrix of order N is known: DCT x Sylvester |
| `kronecker:AxB` | x as A rows of B: `left x right^T`, i.e. `(left (x) right) x`, with the arrays `left` and `right` |

`op.inverse()` undoes it; a name then ends in `:inverse` where the matrix is not symmetric.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from lowbit.errors import InputError, unknown
from lowbit.formats.activation import get_act
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg import hadamard

Values = Array | np.ndarray  # a float64 numpy array is computed on the host, where jax would narrow it


def _on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == np.float64


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["n", "across", "inverted", "kind"])
@dataclasses.dataclass(frozen=True)
class Hadamard:
    """Orthonormal transform of length `n` over parts of the last axis (or across them); see the table above."""

    n: int
    across: bool = False
    inverted: bool = False
    kind: str = "hadamard"  # or "dct"

    def __post_init__(self) -> None:
        hadamard.transform(self.n, "dct" if self.kind == "dct" else "refuse")  # refuses what there is not

    @property
    def name(self) -> str:
        return ":".join([self.kind, str(self.n), *["across"] * self.across, *["inverse"] * self.inverted])

    @property
    def arrays(self) -> dict[str, Any]:
        """The matrices that a checkpoint stores: none."""
        return {}

    def check(self, length: int) -> None:
        """Raises `InputError` unless vectors of this length can be transformed."""
        if length % self.n:
            raise InputError(f"online transform {self.name} on {length} values (allowed: multiples of {self.n})")

    def __call__(self, x: Float[Values, "*batch I"]) -> Float[Values, "*batch I"]:
        """Computed in float32 at least, returned in `x`'s dtype."""
        self.check(x.shape[-1])
        t = hadamard.transform(self.n, "dct" if self.kind == "dct" else "refuse")
        if self.across:
            y = t(rearrange(x, "... (n r) -> ... r n", n=self.n), self.inverted)
            return rearrange(y, "... r n -> ... (n r)")
        return t(x.reshape(*x.shape[:-1], -1, self.n), self.inverted).reshape(x.shape)

    def into(self, w_OI: Float[Values, "O I"]) -> Float[Values, "O I"]:
        """`W T^-1`: the weight for an input that this op has transformed. A row w of it is `T^-T w`, here `T w`."""
        return self(w_OI)

    def inverse(self) -> "Hadamard":
        """The op that undoes this one."""
        t = hadamard.transform(self.n, "dct" if self.kind == "dct" else "refuse")
        return self if t.symmetric else dataclasses.replace(self, inverted=not self.inverted)

    def dense(self, length: int) -> Float[np.ndarray, "I I"]:
        """The matrix T in float64: the op maps x to `x @ T.T`."""
        self.check(length)
        t = hadamard.transform(self.n, "dct" if self.kind == "dct" else "refuse").dense()
        t, eye = (t.T if self.inverted else t), np.eye(length // self.n)
        return np.kron(t, eye) if self.across else np.kron(eye, t)


@partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """`(left (x) right) x` for any two square matrices, in `a + b` multiplications a value instead of `a b`."""

    left: Any  # float [a, a]
    right: Any  # float [b, b]

    @property
    def name(self) -> str:
        return f"kronecker:{self.left.shape[-1]}x{self.right.shape[-1]}"

    @property
    def arrays(self) -> dict[str, Any]:
        """The matrices that a checkpoint stores."""
        return {"left": self.left, "right": self.right}

    def check(self, length: int) -> None:
        """Raises `InputError` unless vectors of this length can be transformed."""
        a, b = self.left.shape[-1], self.right.shape[-1]
        if length != a * b:
            raise InputError(f"online transform {self.name} on {length} values (allowed: {a * b})")

    def __call__(self, x: Float[Values, "*batch I"]) -> Float[Values, "*batch I"]:
        """Computed in float32 at least, returned in `x`'s dtype."""
        return self._map(x, self.left, self.right)

    def into(self, w_OI: Float[Values, "O I"]) -> Float[Values, "O I"]:
        """`W T^-1`: the weight for an input that this op has transformed."""
        inv = np.linalg.inv if _on_host(w_OI) else jnp.linalg.inv
        dtype = np.float64 if _on_host(w_OI) else jnp.promote_types(w_OI.dtype, jnp.float32)
        # A row w of it is T^-T w.
        return self._map(w_OI, *(inv(m.astype(dtype)).T for m in (self.left, self.right)))

    def _map(self, x: Values, left: Any, right: Any) -> Values:
        self.check(x.shape[-1])
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        y = rearrange(x.astype(dtype), "... (a b) -> ... a b", b=right.shape[-1])
        if _on_host(x):
            y = np.asarray(left, np.float64) @ y @ np.asarray(right, np.float64).T
        else:
            left, right = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
            y = jnp.einsum("...ab,ca,db->...cd", y, left, right, precision=jax.lax.Precision.HIGHEST)
        return rearrange(y, "... a b -> ... (a b)").astype(x.dtype)

    def inverse(self) -> "Kronecker":
        """The op that undoes this one; computed in float64 on the host."""
        return Kronecker(*(np.linalg.inv(np.asarray(m, np.float64)) for m in (self.left, self.right)))

    def dense(self, length: int) -> Float[np.ndarray, "I I"]:
        """The matrix T in float64: the op maps x to `x @ T.T`."""
        self.check(length)
        return np.kron(np.asarray(self.left, np.float64), np.asarray(self.right, np.float64))


Op = Hadamard | Kronecker


def array_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that the op of this name stores. Raises `InputError` for an unknown name."""
    if m := re.fullmatch(r"kronecker:([1-9]\d*)x([1-9]\d*)", name):
        return {"left": (int(m[1]),) * 2, "right": (int(m[2]),) * 2}
    get(name)
    return {}


def get(name: str, arrays: dict[str, Any] | None = None) -> Op:
    """The op of a name (see the table above) with its arrays. Raises `InputError`."""
    if m := re.fullmatch(r"(hadamard|dct):([1-9]\d*)(:across)?(:inverse)?", name):
        return Hadamard(int(m[2]), m[3] is not None, m[4] is not None, m[1])
    if re.fullmatch(r"kronecker:[1-9]\d*x[1-9]\d*", name) and arrays is not None and set(arrays) == {"left", "right"}:
        return Kronecker(arrays["left"], arrays["right"])
    raise unknown("online transform", name, ("hadamard:64", "hadamard:8:across", "dct:12", "kronecker:16x8"))


# -- what is done to a linear's input, as names and arrays ------------------------------------------------------------


def describe(leaf: PreparedInput) -> tuple[dict[str, str], dict[str, Any]]:
    """`{"input": activation format, "online": op}` (what there is of them) and the arrays they store, `input.NAME` and
    `online.NAME`."""
    names, arrays = {}, {}
    if leaf.act is not None:
        names["input"] = leaf.act.name
        arrays |= {f"input.{k}": a for k, a in leaf.params.items()}
    if leaf.op is not None:
        names["online"] = leaf.op.name
        arrays |= {f"online.{k}": a for k, a in leaf.op.arrays.items()}
    return names, arrays


def described_shapes(names: dict[str, str], length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that `describe` gave for these names and an input of this length. Raises `InputError` for
    unknown names, and for ops that do not take such an input."""
    shapes: dict[str, tuple[int, ...]] = {}
    if "input" in names:
        act = get_act(names["input"])
        act.check((length,))
        shapes |= {f"input.{k}": s for k, s in act.array_shapes(length).items()}
    if "online" in names:
        own = array_shapes(names["online"])
        shapes |= {f"online.{k}": s for k, s in own.items()}
        get(names["online"], {k: np.broadcast_to(np.float32(0), s) for k, s in own.items()}).check(length)
    return shapes


def restore(leaf: Any, names: dict[str, str], arrays: dict[str, Any]) -> Any:
    """Inverse of `describe`: `leaf` prepared as the names and arrays say, or itself if there are no names."""
    if not names:
        return leaf
    act = get_act(names["input"]) if "input" in names else None
    own = {k.removeprefix("online."): a for k, a in arrays.items() if k.startswith("online.")}
    op = get(names["online"], own) if "online" in names else None
    params = {k.removeprefix("input."): a for k, a in arrays.items() if k.startswith("input.")}
    return PreparedInput(leaf, act, op, params)

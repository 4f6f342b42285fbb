"""What layouts share: the interface, and the vectors of a rotated weight."""

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit.errors import InputError
from lowbit.formats.base import Format, FormatError, Params, QTensor, unpacked
from lowbit.vq.incoherent import Incoherent

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Written = tuple[Shape, str, int]  # shape, dtype and bytes of a tensor
ROUNDED = 2.0**-18  # of the largest weight: what a product in another order may differ by in float32


@dataclasses.dataclass(frozen=True)
class Entry:
    """A weight in a folder: its format here, the tensors `PATH.NAME` that hold it with shape and dtype, and `load`,
    which makes the `QTensor` of them and raises `FormatError` for values out of range."""

    format: Format
    tensors: dict[str, tuple[Shape, str]]
    load: Callable[[Arrays], QTensor]


class Layout(ABC):
    """One layout; `allowed` names the formats that it holds, `families` the models that its runtime has (all: None)."""

    name: ClassVar[str]
    allowed: ClassVar[str]
    families: ClassVar[tuple[str, ...] | None] = None
    note: ClassVar[str] = ""  # for the report of an export

    @abstractmethod
    def why_not(self, path: str, fmt: Format, shape: Shape) -> str | None:
        """Why the layout cannot hold a weight of this format and shape, None if it can."""

    @abstractmethod
    def config(self, packed: Mapping[str, tuple[Format, Shape]], kept: list[str]) -> dict[str, Any]:
        """What `config.json` says besides the model: of the packed weights and of the linears that keep theirs. Raises
        `InputError` naming a weight where all must agree and do not."""

    @abstractmethod
    def tensors(self, q: QTensor) -> Arrays:
        """The arrays of a weight that `why_not` lets pass. Raises `FormatError` for values that have no place."""

    @abstractmethod
    def entries(self, raw: dict[str, Any], shapes: Mapping[str, Shape], stored: Any) -> dict[str, Entry]:
        """The packed weights of a folder: from its `config.json`, the matrices of its model by path, and its tensors
        (`name in stored`, `stored.shape(name)`). Raises `InputError` for settings that no format here has."""

    def slack(self, w_OI: np.ndarray) -> np.ndarray | float:
        """Largest difference from the source's decoded weight that writing and reading may make: none."""
        return 0.0

    def files(self, config: dict[str, Any], written: Mapping[str, Mapping[str, Written]]) -> dict[str, Any]:
        """JSON files besides `config.json`; `written` are the tensors of the packed weights by path and name."""
        return {}


# -- arrays -----------------------------------------------------------------------------------------------------------


def codes_of(q: QTensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes and stored parameters of a weight, on the host."""
    codes, stored = unpacked(q)
    return np.asarray(codes), {k: np.asarray(a) for k, a in stored.items()}


@partial(jax.jit, static_argnums=0)
def pack(fmt: Format, codes: Array, stored: Params) -> dict[str, Array]:
    """`fmt.pack` in one compiled program."""
    return fmt.pack(codes, stored)


def packed(fmt: Format, shape: Shape, codes: np.ndarray, stored: Mapping[str, Any]) -> QTensor:
    """The weight of a format from codes and parameters; those of a rotation (`su`, `sv`) are fp16."""
    signs = {k: jnp.asarray(a, jnp.float16) for k, a in stored.items() if k in ("su", "sv")}
    own = {k: jnp.asarray(a, jnp.float32) for k, a in stored.items() if k not in signs}
    inner = fmt.inner if isinstance(fmt, Incoherent) else fmt
    return QTensor({**pack(inner, jnp.asarray(codes, jnp.int32), own), **signs}, fmt, (shape[0], shape[1]))


def same(packed: Mapping[str, tuple[Format, Shape]], what: Callable[[str, Format], Any], named: str) -> Any:
    """What all packed weights must have in common; raises `InputError` with the first that differs."""
    found = {path: what(path, fmt) for path, (fmt, _) in packed.items()}
    first = next(iter(found))
    for path, value in found.items():
        if value != found[first]:
            names = f"{path} is in {packed[path][0].name} and {first} in {packed[first][0].name}"
            raise InputError(f"{names} (allowed: one {named} for all)")
    return found[first]


def setting(config: Mapping[str, Any], key: str, allowed: Callable[[Any], bool], what: str, where: str) -> Any:
    """A value of a configuration. Raises `InputError` where it is missing or not allowed."""
    value = config.get(key)
    if not allowed(value):
        raise InputError(f"{where}: {key} is {value!r} (allowed: {what})")
    return value


def whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number of a range, ends included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check(path: str, fmt: Format, shape: Shape) -> None:
    """`fmt.check` with the weight's name."""
    try:
        fmt.check(shape)
    except FormatError as e:
        raise InputError(f"{path}: {e}") from e


def inside_layers(path: str) -> re.Match[str] | None:
    """Groups: the layer's number, and the linear's name."""
    return re.fullmatch(r"model\.layers\.(\d+)\.(.*)", path)


# -- rotations --------------------------------------------------------------------------------------------------------


def why_not_rotated(fmt: Format, shape: Shape, block: int | None) -> str | None:
    """None for a weight behind the Hadamard transform that a layout has: of the whole width, which must be a power of
    two (other orders' matrices are not unique, and ours are not the runtimes'), or of blocks."""
    wanted = "the full width" if block is None else f"blocks of {block}"
    if not isinstance(fmt, Incoherent):
        return "it is not rotated"
    if fmt.block != block:
        return f"it is rotated over {'the full width' if fmt.block is None else f'blocks of {fmt.block}'}, not {wanted}"
    for n in shape:
        if block is None and n & (n - 1):
            return f"a side of {n} is no power of two, and the runtime's Hadamard matrix of that order is another one"
        if block is not None and n % block:
            return f"a side of {n} is no multiple of {block}"
    return None


def signs(stored: Mapping[str, np.ndarray]) -> tuple[Float[np.ndarray, " I"], Float[np.ndarray, " O"], float]:
    """`su`, `sv` and the one scale of a rotated weight, float64 and exact."""
    scale = float(stored["scale"].item())
    return stored["su"].reshape(-1).astype(np.float64), stored["sv"].reshape(-1).astype(np.float64), scale


def to_half(x: np.ndarray, what: str) -> np.ndarray:
    """fp16. Raises `FormatError` for what becomes infinite or 0."""
    with np.errstate(over="ignore", under="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all() or (half == 0).any():
        raise FormatError(f"{what}: magnitudes {np.abs(x).min():.3g} to {np.abs(x).max():.3g} (allowed: fp16's, not 0)")
    return half


def factors(scale: float) -> tuple[float, float]:
    """Two fp16 numbers near the scale's root whose product is it, or next to it (2^-18 of it at most)."""
    a = 2.0 ** round(math.log2(scale) / 2) * (1 + np.arange(1024) / 1024)
    b = (scale / a).astype(np.float16).astype(np.float64)
    best = int(np.argmin(np.abs(a * b - scale)))
    return float(a[best]), float(b[best])


def common_scale(x: np.ndarray) -> tuple[float, np.ndarray] | None:
    """`(s, y)` with `x = s y` exactly, y in fp16 and s of at most 12 significant bits; None if there is none."""
    fraction, exponent = np.frexp(np.abs(x).astype(np.float64))
    whole = (fraction * 2.0**24).astype(np.int64)  # float32 has 24 bits
    if not whole.all():
        return None
    zeros = (whole & -whole).astype(np.float64)
    odd = (whole / zeros).astype(np.int64)
    top = int(odd.max())
    common = int(np.gcd.reduce(odd))
    for d in range(min(common, 4095), 0, -1):
        if common % d == 0 and top // d < 2048:
            size = x.astype(np.float64) / d
            shift = 2.0 ** math.floor(math.log2(np.abs(size).max()))
            y = (size / shift).astype(np.float16)
            return (d * shift, y) if np.array_equal(y.astype(np.float64) * (d * shift), x.astype(np.float64)) else None
    return None

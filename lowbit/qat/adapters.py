"""What the recipes with low-rank adapters share: their keys, where adapters go, and merging.

A recipe's name is `NAME[:key...]`, keys in any order:

| key | choices | default |
|---|---|---|
| rank | `rN` | `r16` |
| alpha; an update is `alpha / rank * B A` | `aX` | the rank |
| which linears | `q+k+v+o+gate+up+down`, any of them | every linear that the plan quantizes |
| seed of A | `seedN` | `seed0` |
| alternations, for `loftq` | `tN` | `t5` |
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Format, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot.api import dense
from lowbit.models.cache import attach
from lowbit.models.hf import FLOATS
from lowbit.ptq import rtn
from lowbit.qat.latents import INPUT, Stored
from lowbit.tree import Tree

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_TARGETS = "|".join(LINEARS)
_KEYS = {
    "rank": r"r([1-9]\d*)",
    "alpha": r"a(\d+(?:\.\d+)?)",
    "seed": r"seed(\d+)",
    "rounds": r"t([1-9]\d*)",
    "targets": rf"({_TARGETS})(\+({_TARGETS}))*",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of a recipe's name; `alpha` None is the rank, no `targets` are all linears."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    seed: int = 0
    rounds: int = 5

    @property
    def scaling(self) -> float:
        """What `B A` is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def takes(self, path: str) -> bool:
        """Whether a quantized weight gets an adapter. Embeddings are looked up, not multiplied, and get none."""
        name = path.rpartition(".")[2]
        return name != "embed_tokens" if not self.targets else name.removesuffix("_proj") in self.targets


DEFAULT = Options()


def parse(family: str, keys: list[str], rounds: bool = False) -> tuple[str, Options]:
    """The canonical name and the options of a recipe's keys; `tN` only with `rounds`. Raises `InputError`."""
    allowed = {k: v for k, v in _KEYS.items() if rounds or k != "rounds"}
    found: dict[str, Any] = {}
    for key in keys:
        kind = next((k for k, pattern in allowed.items() if re.fullmatch(pattern, key)), None)
        if kind is None:
            samples = ["r16", "a16", "q+v", "seed0", *["t5"] * rounds]
            raise InputError(str(unknown(f"key of recipe {family}", key, samples)))
        if kind in found:
            raise InputError(f"recipe {family}: key {key!r} gives a second {kind} (allowed: one)")
        found[kind] = key
    numbers = {k: re.sub(r"^[a-z]+", "", v) for k, v in found.items() if k != "targets"}
    values: dict[str, Any] = {k: float(v) if k == "alpha" else int(v) for k, v in numbers.items()}
    if "targets" in found:
        values["targets"] = tuple(t for t in LINEARS if t in found["targets"].split("+"))
    options = Options(**values)
    if options.scaling == 0:
        raise InputError(f"recipe {family}: alpha 0 (allowed: above 0)")
    shown = [f"r{options.rank}", f"a{options.scaling * options.rank:g}"]
    shown += ["+".join(options.targets)] * bool(options.targets)
    shown += [f"seed{options.seed}"] * (options.seed > 0) + [f"t{options.rounds}"] * rounds
    return ":".join([family, *shown]), options


def random_a(path: str, rank: int, inputs: int, pool: int, seed: int) -> Float[Array, "r G"]:
    """A at the start: uniform within `1 / sqrt(inputs)`, as in Hugging Face's peft; numpy's draw of seed and path."""
    rng = np.random.default_rng([seed, *path.encode()])
    bound = inputs**-0.5
    return jnp.asarray(rng.uniform(-bound, bound, (rank, inputs // pool)).astype(np.float32))


Start = Callable[[str, Any, Format], Adapter]


def prepare(
    params: Tree, assignment: Mapping[str, Any], options: Options, start: Start, stored: Stored | None = None
) -> Tree:
    """The tree with `start(path, w, format)` at the weights that `options` take, `w` being a float array or packed in
    that format already, and the others of the assignment packed; activation formats and caches as in `latents`.

    Raises `InputError` on a plan that quantizes no weight, targets that match none, weights that are packed in another
    format or have an adapter, and as `start` does.
    """
    weights = {site: fmt for site, fmt in assignment.items() if isinstance(fmt, Format)}
    if not weights:
        raise InputError("adapters with a plan that quantizes no weight (allowed: a format other than bf16)")
    if not any(map(options.takes, weights)):
        raise InputError(f"no quantized weight is among {'+'.join(options.targets)} (allowed: {_some(weights)})")
    params, sites = attach(params, assignment)
    rtn.check_paths(params, sites)

    def one(path: str, leaf: Any) -> Any:
        if (act := sites.get(path + INPUT)) is not None:
            rtn.check_leaf(path, leaf, None, act)
            try:
                leaf = rtn.with_act(leaf, act, (stored or {}).get(path))
            except InputError as e:
                raise InputError(f"{path}{INPUT}: {e}") from e
        if path not in weights:
            return leaf
        w, fmt = _weight(leaf), weights[path]
        if isinstance(w, Adapter):
            raise InputError(f"{path} has an adapter already (allowed: one; merge it first)")
        packed = isinstance(w, QTensor) and w.format == fmt
        if not packed and not isinstance(w, jax.Array):
            kind = f"packed as {w.format.name}" if isinstance(w, QTensor) else f"a {type(w).__name__}"
            raise InputError(f"{path} is {kind} already (allowed: a float array, or packed as {fmt.name})")
        try:
            new = start(path, w, fmt) if options.takes(path) else base_of(w, fmt)
        except InputError as e:
            raise InputError(str(e) if path in str(e) else f"{path}: {e}") from e
        return rtn.with_weight(leaf, new)

    return trees.map_leaves(one, params)


def base_of(w: Any, fmt: Format) -> QTensor:
    """`w` rounded to nearest, or as it is if it is packed already."""
    if isinstance(w, QTensor):
        return w
    if isinstance(w, jax.core.Tracer):  # an abstract evaluation, of a dry run: there are no values to check
        return fmt.encode(w.astype(jnp.float32))
    return rtn.encode(fmt, w)


def convert(params: Tree) -> Tree:
    """Adapters stay beside their packed weights: merging and rounding again would lose what was learned. A copy."""
    return trees.map_leaves(lambda _, leaf: leaf, params)


def merged(params: Tree, dtype: str = "float32") -> Tree:
    """Every adapter added into its weight, decoded: `w_hat + scaling B A`, summed in float32, which is the same
    function up to rounding, then cast to `dtype` (`float32`, `bfloat16`, `float16`).

    Weights without an adapter stay as they are, packed ones packed. Nothing is quantized again: that would be another
    model. Raises `InputError` for a tree without adapters and for values that `dtype` does not hold.
    """
    if dtype not in FLOATS:
        raise unknown("dtype", dtype, FLOATS)

    def one(path: str, adapter: Adapter) -> Array:
        w = jax.jit(dense)(adapter)
        cast = w.astype(dtype)
        if not bool(jnp.isfinite(cast).all()):
            raise InputError(f"merged {path} holds {float(jnp.abs(w).max()):g}, beyond {dtype} (allowed: float32)")
        return cast

    return replace(params, one)


def parameters(params: Tree) -> int:
    """How many numbers the adapters of a tree (of arrays or `ShapeDtypeStruct`s) hold."""
    found = [_weight(leaf) for _, leaf in trees.items(params)]
    return sum(math.prod(m.shape) for a in found if isinstance(a, Adapter) for m in (a.a, a.b))


def replace(params: Tree, f: Callable[[str, Adapter], Any]) -> Tree:
    """The tree with `f(path, adapter)` in place of every adapter, inputs prepared as before. Raises `InputError` for a
    tree without any."""
    if not any(isinstance(_weight(leaf), Adapter) for _, leaf in trees.items(params)):
        raise InputError("no adapter to merge (allowed: a model with adapters)")

    def one(path: str, leaf: Any) -> Any:
        w = _weight(leaf)
        return rtn.with_weight(leaf, f(path, w)) if isinstance(w, Adapter) else leaf

    return trees.map_leaves(one, params)


def _weight(leaf: Any) -> Any:
    return leaf.w if isinstance(leaf, PreparedInput) else leaf


def _some(paths: Mapping[str, Any]) -> str:
    return ", ".join(sorted({p.rpartition(".")[2] for p in paths}))

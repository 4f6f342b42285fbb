"""QuaRot: random Hadamard rotations that spread outliers over all channels (Ashkboos et al. 2024, arXiv 2404.00456).

| part | what | where it goes |
|---|---|---|
| `r1` | the residual stream rotated by a random Hadamard matrix | folded; norms first, head untied |
| `heads` | each value head rotated, and across heads before `o_proj` | the first folded, the second online |
| `r3` | q and k rotated after RoPE, per head | online; cancels in q k^T, so only a cache format sees it |
| `r4` | the input of `down_proj` rotated | online |

`(I (x) H_dh)(H_nh (x) I) = H_{nh dh}`, so the two halves of `heads` give `o_proj` a fully rotated input. Names:
`quarot` is all four; `quarot:r1+r4`; `:dct` or `:blocks` decides about lengths without a Hadamard matrix (head counts
across heads are never blocked); `:s1` is the seed of R1's signs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from lowbit.errors import InputError
from lowbit.linalg import hadamard
from lowbit.linalg.online import Hadamard
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.rotations.base import Transform, no_more, number_of, parts_of, register
from lowbit.rotations.fold import State, check_norms, check_residual

PARTS = ("r1", "heads", "r3", "r4")
FALLBACKS = ("dct", "blocks")
OFFER = "; allowed: quarot:heads+r3+r4"


def fit(
    model: Model,
    documents: Sequence[str] | None = None,
    assignment: Mapping[str, Any] | None = None,
    *,
    name: str = "quarot",
    parts: Sequence[str] = PARTS,
    fallback: str = "refuse",
    seed: int = 0,
) -> State:
    """The state of QuaRot for a model; needs no data. Raises `InputError` for sizes without a Hadamard matrix under
    `fallback="refuse"`, naming the size, and for R1 of a model with sandwich norms."""
    c = model.config
    check_norms(c)
    layers = range(c.num_layers)
    residual, heads, inputs, caches = None, {}, {}, {}
    if "r1" in parts:
        check_residual(c, OFFER)
        with naming(f"hidden size {c.hidden_size}"):
            residual = hadamard.randomized(c.hidden_size, jax.random.key(seed), fallback)
    if "heads" in parts:
        with naming(f"head dimension {c.head_dim}"):
            own = hadamard.transform(c.head_dim, fallback).dense()
        heads = {i: own.T for i in layers}
        inputs |= across(c, fallback)
    if "r3" in parts:
        caches |= r3(c, fallback)
    if "r4" in parts:
        inputs |= r4(c, fallback)
    return State(name, "r1" in parts, residual, heads, {}, inputs, caches)


def across(c: ModelConfig, fallback: str = "refuse") -> dict[str, Any]:
    """`{o_proj: Hadamard across heads}`."""
    with naming(f"{c.num_heads} heads"):
        op = online(c.num_heads, "refuse" if fallback == "blocks" else fallback, across=True)
    return {f"model.layers.{i}.self_attn.o_proj": op for i in range(c.num_layers)}


def r3(c: ModelConfig, fallback: str = "refuse") -> dict[str, Any]:
    """`{k_cache site: Hadamard over the head dimension}`."""
    with naming(f"head dimension {c.head_dim}"):
        op = online(c.head_dim, fallback)
    return {f"model.layers.{i}.self_attn.k_cache": op for i in range(c.num_layers)}


def r4(c: ModelConfig, fallback: str = "refuse") -> dict[str, Any]:
    """`{down_proj: Hadamard over its input}`."""
    with naming(f"intermediate size {c.intermediate_size}"):
        op = online(c.intermediate_size, fallback)
    return {f"model.layers.{i}.mlp.down_proj": op for i in range(c.num_layers)}


def online(n: int, fallback: str, across: bool = False) -> Hadamard:
    """The op for length n: Hadamard where there is one, else what `fallback` says. Raises `InputError`."""
    if hadamard.cores(n) is not None or fallback == "refuse":
        return Hadamard(n, across)
    if fallback == "dct":
        return Hadamard(n, across, kind="dct")
    power = n & -n
    if power == 1:
        raise InputError(f"blocks in a Hadamard transform of odd length {n} (allowed: dct)")
    return Hadamard(power)  # on each part


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts what has the wrong size in front of an `InputError`."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{what}: {e}") from e


def fallback_of(name: str, keys: list[str]) -> tuple[str, list[str]]:
    """What a name decides about lengths without a Hadamard matrix, and its other keys. Raises `InputError` for both."""
    found = [k for k in keys if k in FALLBACKS]
    if len(found) > 1:
        raise InputError(f"transform {name!r} with {' and '.join(found)} (allowed: one of {', '.join(FALLBACKS)})")
    return found[0] if found else "refuse", [k for k in keys if k not in FALLBACKS]


def _parse(name: str, keys: list[str]) -> Transform:
    parts, keys = parts_of(name, keys, PARTS, PARTS)
    seed = number_of(name, keys, "s", 0, 0, 2**31 - 1)
    fallback, keys = fallback_of(name, keys)
    no_more(name, keys, [*PARTS, *FALLBACKS, "s0"])
    return Transform(name, partial(fit, name=name, parts=parts, fallback=fallback, seed=seed))


register("quarot", _parse, ["quarot", "quarot:r1", "quarot:heads+r3+r4", "quarot:r1+r4:dct:s1"])

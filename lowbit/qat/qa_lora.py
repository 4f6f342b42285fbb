"""QA-LoRA (Xu et al. 2023, arXiv 2309.14717): an adapter that merges into the minima of the groups, so that the trained
model is as small as the rounded one and stays on integers.

    y = x w_hat^T + alpha / r * (sum_g(x) A^T) B^T,        w_hat = c * d + m

Its Algorithm 1 sums the inputs of each group of g columns, so the update is one number for a row and a group, and

    m <- m + alpha / r * B A

is the same function, exactly but for the rounding of the new m to its stored type (the paper shifts the zero point by
`B A / d`, which a float zero point makes the same). With `intN:gG:min32` that is float32's rounding; with q4_1 and
`intN:gG:min` fp16's, up to 2^-11 of m. A is drawn as in `qlora`, B is zero. Groups are the format's (the paper's: 32).
A base that is packed in the format already (by GPTQ, as in the paper) keeps its codes.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter, check
from lowbit.formats.base import Format, QTensor
from lowbit.formats.floats import STORAGE, round_to
from lowbit.formats.kquant import KQuant
from lowbit.formats.uniform import Uniform
from lowbit.qat.adapters import DEFAULT, Options, base_of, parse, random_a, replace
from lowbit.qat.adapters import prepare as put
from lowbit.qat.base import Recipe, register_family
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


def prepare(
    params: Tree, assignment: Mapping[str, Any], *, options: Options = DEFAULT, stored: Stored | None = None
) -> Tree:
    """Pooled adapters over packed weights, with B zero. Raises `InputError` as `adapters.prepare` does, for formats
    without a float minimum and for a rank beyond the rows or the groups of a weight."""
    return put(params, assignment, options, partial(start, options), stored)


def start(options: Options, path: str, w: Any, fmt: Format) -> Adapter:
    """The adapter of one weight."""
    if not has_float_minimum(fmt) or fmt.granularity == "tensor":
        raise InputError(
            f"qa-lora: format {fmt.name!r} of {path} has no float minimum for each group of a row "
            "(allowed: q4_1, q5_1, intN:gG:min, intN:gG:min32)"
        )
    pool = fmt.group(w.shape)
    check(path, w.shape, options.rank, pool)
    a = random_a(path, options.rank, w.shape[1], pool, options.seed)
    return Adapter(base_of(w, fmt), a, jnp.zeros((w.shape[0], options.rank)), options.scaling, pool)


def has_float_minimum(fmt: Any) -> bool:
    """Whether a format keeps a float minimum for each group (a k-quant's is a small integer times another scale)."""
    return isinstance(fmt, Uniform) and fmt.has_min and not isinstance(fmt, KQuant)


def convert(params: Tree) -> Tree:
    """Every adapter merged into the minima of its packed weight; nothing else of it changes. Raises `InputError` for
    adapters that do not pool over the groups of such a format, and for minima that its storage cannot hold."""
    return replace(params, merge)


def merge(path: str, leaf: Adapter) -> QTensor:
    """One weight with its adapter in its minima."""
    q = leaf.w
    if not isinstance(q, QTensor) or not has_float_minimum(q.format) or leaf.pool != q.format.group(q.shape):
        held = q.format.name if isinstance(q, QTensor) else type(q).__name__
        raise InputError(f"adapter of {path} over {held} does not merge into minima (allowed: those of qa-lora)")
    least = q.arrays["min"].astype(jnp.float32) + leaf.delta()
    try:
        q.format.check_range("min", least, q.format.min_storage)
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    stored = round_to(least, q.format.min_storage).astype(STORAGE[q.format.min_storage])
    return dataclasses.replace(q, arrays={**q.arrays, "min": stored})


def _parse(keys: list[str]) -> Recipe:
    name, options = parse("qa-lora", keys)
    return Recipe(name, partial(prepare, options=options), convert, {})


register_family("qa-lora", _parse)

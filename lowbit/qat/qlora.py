"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): a packed, frozen weight under a trained low-rank update.

    y = x w_hat^T + alpha / r * (x A^T) B^T,    A random, B zero at the start, so training starts from the rounded model

The paper's base is `nf4:dq`; any format works, and so does a base that a solver has packed already. The base stays
packed: it is decoded in the forward pass, and again in the backward one. Keys are those of `lowbit.qat.adapters`; the
paper has r 64 and alpha 16 on every linear, with AdamW at a constant 2e-4 (7B), no weight decay and gradients clipped
to 0.3; the defaults here are r 16, alpha 16. Paged optimizer states are not here: states of adapters are small.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from lowbit.formats.adapter import Adapter, check
from lowbit.formats.base import Format
from lowbit.qat.adapters import DEFAULT, Options, base_of, convert, parse, random_a
from lowbit.qat.adapters import prepare as put
from lowbit.qat.base import Recipe, register_family
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


def prepare(
    params: Tree, assignment: Mapping[str, Any], *, options: Options = DEFAULT, stored: Stored | None = None
) -> Tree:
    """Adapters over packed weights, with B zero: the forward pass is that of the weights rounded to nearest. Raises
    `InputError` as `adapters.prepare` does, and for a rank beyond a weight's sides."""
    return put(params, assignment, options, partial(start, options), stored)


def start(options: Options, path: str, w: Any, fmt: Format) -> Adapter:
    """The adapter of one weight."""
    check(path, w.shape, options.rank)
    a = random_a(path, options.rank, w.shape[1], 1, options.seed)
    return Adapter(base_of(w, fmt), a, jnp.zeros((w.shape[0], options.rank)), options.scaling)


def _parse(keys: list[str]) -> Recipe:
    name, options = parse("qlora", keys)
    return Recipe(name, partial(prepare, options=options), convert, {})


register_family("qlora", _parse)

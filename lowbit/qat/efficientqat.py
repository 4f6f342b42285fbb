"""EfficientQAT (arXiv 2407.11062): blocks learn one by one, then all scales together.

| recipe | block by block (`lowbit.qat.block_ap`) | end to end |
|---|---|---|
| `block-ap` | weights, scales and zero points | nothing |
| `e2e-qp` | nothing: codes of round-to-nearest, or of a model that is packed already (by GPTQ, say) | scales |
| `efficientqat` | weights, scales and zero points | scales |

End to end codes and zero points are frozen and stay packed (`Coded`); everything outside of the scales has a learning
rate of 0. The published code trains norms in Block-AP, too, which here stay as they are, so that packed and trained
weights give the same bits; it moves the latest epoch on, here the best one is kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Coded, Format, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import attach
from lowbit.plan import INPUT
from lowbit.ptq import rtn
from lowbit.qat import latents
from lowbit.qat.base import Before, Recipe, register
from lowbit.qat.block_ap import block_ap, latent
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


def packed(params: Tree, assignment: Mapping[str, Any], *, stored: Stored | None = None) -> Tree:
    """The sites of `assignment` in their formats: those that are already stay, float weights are rounded to nearest.

    Raises `InputError` for a site that does not exist, that has another format, or whose format cannot be trained.
    """
    params, assignment = attach(params, assignment)
    rtn.check_paths(params, assignment)

    def one(path: str, leaf: Any) -> Any:
        fmt, act = assignment.get(path), assignment.get(path + INPUT)
        whole = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
        if isinstance(fmt, Format) and not fmt.trainable:
            raise InputError(f"format {fmt.name!r} of {path} has no gradient (use it with a solver instead)")
        if isinstance(whole.w, QTensor) and whole.w.format == fmt:
            fmt = None
        if whole.act is not None and whole.act == act:
            act = None
        rtn.check_leaf(path, leaf, fmt, act)
        if fmt is not None:
            leaf = rtn.with_weight(leaf, fmt.encode(jnp.asarray(whole.w, jnp.float32)))
        if act is None:
            return leaf
        try:
            return rtn.with_act(leaf, act, (stored or {}).get(path))
        except InputError as e:
            raise InputError(f"{path}{INPUT}: {e}") from e

    return trees.map_leaves(one, params)


def scales(params: Tree, assignment: Mapping[str, Any], *, stored: Stored | None = None, every: bool = False) -> Tree:
    """`packed`, with scales (or `every` real array) to be trained: a `Coded` at every weight of `assignment`. Raises
    `InputError` as `packed` does, and for a format without scales."""

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(assignment.get(path), Format):
            return leaf
        whole = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
        try:
            coded = Coded.of(whole.w, every)
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
        return dataclasses.replace(leaf, w=coded) if isinstance(leaf, PreparedInput) else coded

    return trees.map_leaves(one, packed(params, assignment, stored=stored))


# AdamW, the rate for 2 bits (1e-5 at 3 and 4) and the gradient norm of the paper's E2E-QP; what is no scale is frozen.
E2E = {"lr": 2e-5, "scale_lr": 1.0, "lr_groups": (("[^:]+", 0.0),), "b2": 0.999, "clip": 0.3}

register(Recipe("block-ap", packed, latents.convert, {}, before=Before(block_ap, latent, alone=True)))
register(Recipe("e2e-qp", scales, latents.convert, E2E))
register(Recipe("efficientqat", scales, latents.convert, E2E, before=Before(block_ap, latent)))

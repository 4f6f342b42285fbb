"""PV-Tuning (arXiv 2405.14852): everything continuous learns, and now and then a few codes change.

- P step: scales, codebooks, signs, norms by the ordinary optimizer, codes fixed.
- V step (section 3.3): a step is small beside the distance of two code words, so the weights' own updates (the `shift`
  of a `Coded`, which the forward pass does not see) add up by Adam, and every `revise_every` steps those vectors whose
  codes are others there (by the format's own search: nearest point, beam or Viterbi) change, `revise_fraction` of all
  at most, the largest first. They keep as shift what the new codes miss, the others all that has added up.

`e2e-pv` is that, on the whole model; `pv` comes after `block-ft` (`lowbit.qat.finetune`), as the paper's start does.

The paper does this for additive codebooks; here it is any format that stores something real: lattices, trellises,
k-quants, integers. The start is what a solver gave (`lowbit quantize`, a packed model), or rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lowbit import tree as trees
from lowbit.formats.base import SHIFT, Coded
from lowbit.formats.fake_quant import PreparedInput
from lowbit.qat import latents
from lowbit.qat.base import Before, Recipe, register
from lowbit.qat.efficientqat import scales
from lowbit.qat.finetune import blocks, continuous
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


def prepare(params: Tree, assignment: Mapping[str, Any], *, stored: Stored | None = None) -> Tree:
    """A `Coded` with a shift at every weight of `assignment`: what is packed in its format stays, float weights are
    rounded to nearest. Raises `InputError` as `efficientqat.scales` does."""
    return _each(scales(params, assignment, stored=stored, every=True), Coded.with_shift)


def revise(params: Tree, fraction: float) -> Tree:
    """The V step: `Coded.revised` of every weight that has a shift."""
    return _each(params, lambda c: c.revised(fraction) if SHIFT in c.params else c)


def _each(params: Tree, change: Callable[[Coded], Coded]) -> Tree:
    def one(_: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput):
            return dataclasses.replace(leaf, w=one("", leaf.w))
        return change(leaf) if isinstance(leaf, Coded) else leaf

    return trees.map_leaves(one, params)


# The paper's rate of what is continuous; for codes 3e-3 of a row's RMS a step. The paper's 1e-2 is for gradients of
# half a million tokens: from a few thousand it changes codes for the worse.
DEFAULTS = {"lr": 3e-4, "scale_lr": 1.0, "lr_groups": ((rf".*:{SHIFT}", 10.0),), "b2": 0.95}
register(Recipe("e2e-pv", prepare, latents.convert, DEFAULTS, revise=revise))
register(Recipe("pv", prepare, latents.convert, DEFAULTS, before=Before(blocks, continuous), revise=revise))

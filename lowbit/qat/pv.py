"""PV-Tuning (arXiv 2405.14852): everything continuous learns, and now and then a few codes change.

- P step: scales, codebooks, signs, norms by the ordinary optimizer, codes fixed.
- V step, every `revise_every` steps: codes of a few tiles, as `lowbit.qat.recode` says, which is not the paper's rule.

`e2e-pv` is that, on the whole model; `pv` comes after `block-ft` (`lowbit.qat.finetune`), as the paper's start does.

The paper does this for additive codebooks; here it is any format that stores something real: lattices, trellises,
k-quants, integers. The start is what a solver gave (`lowbit quantize`, a packed model), or rounding.
"""

from lowbit.qat import latents
from lowbit.qat.base import Before, Recipe, register
from lowbit.qat.finetune import blocks, continuous
from lowbit.qat.recode import revise

DEFAULTS = {"lr": 3e-4, "scale_lr": 1.0, "b2": 0.95}  # the paper's
register(Recipe("e2e-pv", continuous, latents.convert, DEFAULTS, revise=revise))
register(Recipe("pv", continuous, latents.convert, DEFAULTS, before=Before(blocks, continuous), revise=revise))

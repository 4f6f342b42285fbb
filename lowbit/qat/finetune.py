"""Fine-tuning around fixed codes: everything continuous of a packed model learns, codes stay.

| recipe | block by block (`lowbit.qat.block_ap`) | end to end |
|---|---|---|
| `block-ft` | scales, signs, codebooks, norms | nothing |
| `e2e-ft` | nothing | scales, signs, codebooks, norms, the unquantized rest |
| `ft` | as `block-ft` | as `e2e-ft` |

QuIP# (arXiv 2402.04396, section 5), QTIP (2406.11235, section 4.1) and AQLM (2401.06118, section 3.4) do this after
their encoders, block by block against the output of the unquantized block, then on the whole model against its logits.
QuIP# also tunes the float weights of a block that is quantized in part; here codes are there before the first step.
Start from a packed model (`lowbit quantize --solver ldlq`, say) and name the float one by `--teacher`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lowbit.qat import latents
from lowbit.qat.base import Before, Recipe, register
from lowbit.qat.block_ap import block_ap
from lowbit.qat.efficientqat import packed, scales
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


def continuous(params: Tree, assignment: Mapping[str, Any], *, stored: Stored | None = None) -> Tree:
    """A `Coded` at every weight of `assignment`, of which everything that is stored real is trained. Raises
    `InputError` as `efficientqat.scales` does."""
    return scales(params, assignment, stored=stored, every=True)


E2E = {"lr": 5e-5, "scale_lr": 1.0}  # QuIP#'s rate
blocks = partial(block_ap, start=continuous)

register(Recipe("block-ft", packed, latents.convert, {}, before=Before(blocks, continuous, alone=True)))
register(Recipe("e2e-ft", continuous, latents.convert, E2E))
register(Recipe("ft", continuous, latents.convert, E2E, before=Before(blocks, continuous)))

"""ParetoQ (Liu et al. 2025, arXiv 2502.02631): for each bit width its own grid, all with learned scales.

| bits | format | levels | alpha starts at |
|---|---|---|---|
| 1 | `int1` | sign(w) alpha | mean of the magnitudes |
| 1.58 | `ternary` | {-2/3, 0, 2/3} alpha (SEQ) | largest magnitude |
| 2 | `int2:midrise` | {-3/4, -1/4, 1/4, 3/4} alpha (SEQ) | largest magnitude |
| 3, 4 | `int3`, `int4` | LSQ's integers | largest magnitude / (2^(b-1) - 1) |

The paper's scales are per output row (`channel`); any granularity works. What is trained is the stored scale s, the
step of the levels: alpha, 2 alpha / 3, alpha / 4 and alpha. Adam sees no difference but the size of a step relative to
the scale. Formats get the gradient policy `paretoq` unless their name gives one: `ternary:channel:paretoq-compat` is
the published code's (1.0 instead of 2/3 for what lies outside). A format that searches its scale (`mse`) starts there.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params
from lowbit.formats.dorefa import DoReFa
from lowbit.formats.integer import Integer
from lowbit.formats.ternary import Ternary
from lowbit.qat.base import register_start

ALLOWED = "int1, ternary, int2:midrise, int3, int4"


def start(fmt: Format, w: jax.Array) -> tuple[Format, Params]:
    """See the module. Raises `InputError` for a format that ParetoQ is not defined for."""
    known = isinstance(fmt, Ternary) or (
        isinstance(fmt, Integer) and not fmt.asym and fmt.width <= 4 and fmt.odd == (fmt.width <= 2)
    )
    if not known or isinstance(fmt, DoReFa):
        raise InputError(f"format {fmt.name!r} with recipe paretoq (allowed: {ALLOWED}, with any granularity)")
    if fmt.clip == "none":
        fmt = dataclasses.replace(fmt, clip="paretoq")
    if fmt.searched or (isinstance(fmt, Integer) and fmt.signs):
        return fmt, fmt.fitted(w)
    return fmt, {"scale": _top(fmt, w)}


@partial(jax.jit, static_argnums=0)
def _top(fmt: Integer | Ternary, w: jax.Array) -> jax.Array:
    factor = 2 / 3 if isinstance(fmt, Ternary) else 1 / 4 if fmt.midrise else 1 / fmt.levels[1]
    return fmt.reduce(jnp.maximum, jnp.abs(fmt.blocks(w))) * np.float32(factor)


register_start("paretoq", start, {"lr": 2e-5, "scale_lr": 1.0})

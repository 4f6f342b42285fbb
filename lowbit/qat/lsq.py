"""LSQ and LSQ+: learned step sizes.

`lsq` (Esser et al. 2020, arXiv 1902.08153): the step starts at `2 mean|w| / sqrt(Qp)` (section 2.1) and learns by the
gradient of eq. 3, scaled by `1 / sqrt(N Qp)` (eq. 4). `lsq+` (Bhalgat et al. 2020, arXiv 2004.09576): weights start at
`max(|mu - 3 sd|, |mu + 3 sd|) / 2^(b-1)` (section 3.3), and inputs may have a learned offset.

Weights: symmetric formats of two bits or more (`intN`, ternary, q4_0, q8_0, q2_0, tq1_0, tq2_0) get the `lsq` gradient
policy unless their name gives one. A format that searches its scale (`mse`, `signmse`) starts from that instead.
Inputs: a plan's `path:in` sites in `intN:lsq`, for LSQ+ `intN:lsq:asym` (see `lowbit.formats.learned`), or any other.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params
from lowbit.formats.integer import Integer
from lowbit.formats.mx import MXFP4
from lowbit.formats.uniform import Uniform
from lowbit.qat.base import register_start

DEFAULTS = {"scale_lr": 1.0}  # one rate for weights and steps, as in the papers


def start(fmt: Format, w: jax.Array, plus: bool = False) -> tuple[Format, Params]:
    """See the module. Raises `InputError` for a format with a zero point, a minimum or no level at 0."""
    odd = isinstance(fmt, Integer) and fmt.odd
    if not isinstance(fmt, Uniform) or fmt.has_zero or odd or fmt.has_min or isinstance(fmt, MXFP4):
        name = "lsq+" if plus else "lsq"
        use = "paretoq for int1 and mid-rise grids" if odd else "ste-learned for others"
        raise InputError(f"format {fmt.name!r} with recipe {name} (allowed: symmetric levels with a 0; {use})")
    if fmt.clip == "none":
        fmt = dataclasses.replace(fmt, clip="lsq")
    if fmt.searched:
        return fmt, fmt.fitted(w)
    return fmt, {"scale": (_spread if plus else _mean)(fmt, w)}


@partial(jax.jit, static_argnums=0)
def _mean(fmt: Uniform, w: jax.Array) -> jax.Array:
    return fmt.mean(jnp.abs(fmt.blocks(w))) * (2 / math.sqrt(fmt.levels[1]))


@partial(jax.jit, static_argnums=0)
def _spread(fmt: Uniform, w: jax.Array) -> jax.Array:
    blocks, groups = fmt.blocks(w), w.shape[1] // fmt.group(w.shape)
    axes = (0, 2) if fmt.granularity == "tensor" else 2
    mean, sd = (f(blocks, axis=axes).reshape(-1, groups) for f in (jnp.mean, jnp.std))
    return jnp.maximum(jnp.abs(mean - 3 * sd), jnp.abs(mean + 3 * sd)) / -fmt.levels[0]


register_start("lsq", start, DEFAULTS)
register_start("lsq+", partial(start, plus=True), DEFAULTS)

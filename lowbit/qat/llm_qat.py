"""LLM-QAT: weights, activations and the key-value cache in training, taught by the model itself (arXiv 2305.17888).

All three are rounded symmetrically and without clipping ("MinMax"), with scales that follow the values:

    s = max|x| / (2^(b-1) - 1)      x_hat = rne(x / s) * s      weights per row, activations per token

The gradient is straight-through where |x| < 2 and 0 elsewhere, as in the published code (its `clip_val`); it does not
depend on the scale, and mostly concerns outliers among the activations. The teacher is the model as it was, the loss
its cross-entropy up to a constant: KL(teacher || student) of every position, at temperature 1.

A plan says `int4`, `int8:token`; `prepare` makes `int4:channel:minmax:fixed2` and `int8:token:fixed2` of that. What
differs from the published code:

- Its scale is that of `max|x| + 1e-6`, and it decodes by dividing by `1 / s + 1e-6`: relative errors of `1e-6 / max|x|`
  and `1e-6 s`. Here there is no epsilon (an all-zero row has the smallest scale and codes of 0), scales of weights are
  kept in fp16, and codes are chosen with the stored scale, so that what was trained is what is exported.
- It rounds the outputs of `k_proj` and `v_proj`, before RoPE, with one scale for all heads of a token. A `CacheSite`
  holds what is stored: keys after RoPE, a scale for each head. Their gradient is straight-through everywhere: keys
  after RoPE exceed 2 as a rule.
- Its loss sums over the tokens and divides by the rows ("batchmean"), ours is the mean over tokens: gradients are
  smaller by the length of a row, which Adam does not see, but gradient clipping does.
- Below 3 bits its code has other grids (means instead of maxima), which later became ParetoQ's: not here.
"""

import dataclasses

from lowbit.errors import InputError
from lowbit.formats.activation import ActFormat
from lowbit.formats.base import Format
from lowbit.formats.integer import Integer
from lowbit.formats.kv import KVFormat
from lowbit.qat import latents
from lowbit.qat.base import Recipe, register
from lowbit.qat.latents import Assignment, Stored
from lowbit.tree import Tree

CLIP = 2.0  # |x| below which the gradient passes


def prepare(params: Tree, assignment: Assignment, *, stored: Stored | None = None) -> Tree:
    """What recipe `ste` makes of LLM-QAT's formats, see the module.

    Raises `InputError` as that does, and for weight formats that are not symmetric integers of 3 bits or more with
    `minmax` (or no) calibration.
    """
    published = {site: as_published(site, fmt) for site, fmt in assignment.items()}
    return latents.prepare(params, published, latents.dynamic, stored)


def as_published(site: str, fmt: Format | ActFormat | KVFormat) -> Format | ActFormat | KVFormat:
    """The format with the paper's calibration and gradient, where its name leaves them open."""
    if isinstance(fmt, KVFormat):
        return fmt
    if isinstance(fmt, ActFormat):
        return dataclasses.replace(fmt, clip=CLIP) if fmt.clip == "none" else fmt
    if not isinstance(fmt, Integer) or fmt.asym or fmt.midrise:
        raise InputError(f"{site}: format {fmt.name} with recipe llm-qat (allowed: symmetric int3 to int8)")
    if fmt.width < 3:
        raise InputError(
            f"{site}: format {fmt.name} with recipe llm-qat, which has no grid for {fmt.width} bits (allowed: int3 to "
            f"int8; for {fmt.width} bits recipe paretoq)"
        )
    if fmt.calibration not in ("absmax", "minmax"):
        raise InputError(
            f"{site}: format {fmt.name} with recipe llm-qat, whose scale is minmax (allowed: without "
            f"{fmt.calibration}, or recipe ste)"
        )
    return dataclasses.replace(fmt, calibration="minmax", clip=CLIP if fmt.clip == "none" else fmt.clip)


DEFAULTS = {
    "loss": "kl",
    "lr": 2e-5,
    "schedule": "cosine",
    "lr_end": 0.0,
    "warmup": 0,
    "weight_decay": 0.0,
    "b2": 0.999,
}
register(Recipe("llm-qat", prepare, latents.convert, DEFAULTS, restarts=True))

"""BitNet: weights of one or 1.58 bits whose inputs are integers too.

- `bitnet` (arXiv 2402.17764, b1.58; 2310.11453, one bit): weights in `ternary:tensor` or `int1:tensor:centered`, their
  scale recomputed from the latent at every step; inputs in `int8:token:bitnet` where a plan has no `path:in` rule.
- `bitnet-a4.8` (2411.04965, eqs. 3 to 5): ternary weights; inputs in `int4:token:bitnet`, int8 before `down_proj`, int8
  and only the upper half of the magnitudes before `o_proj`.
- `bitnet-v2` (2504.18415): an online Hadamard transform before `o_proj` and `down_proj`, whose latents live in the
  rotated basis; the rest as `bitnet`.

Nothing is masked: the gradient of inputs takes the quantized weight, that of weights the quantized input. Where inputs
and weights are integers, training computes the product of the integers (`lowbit.kernels.qdot`): an int8 kernel gives
the same bits.

What belongs to the model is the model's: SubLN norms and the squared ReLU are `ModelConfig.sub_norm` and `activation`.
The learning rate of two stages is `TrainConfig.schedule = "two-stage"` with `decay_until = 0.5`, warming a pretrained
model up is `quant_warmup`, and a4.8's last stage is a `Stage` of the loop (`--stages` of the command).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.activation import get_act
from lowbit.formats.base import Format, Params
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.integer import Integer
from lowbit.formats.ternary import Ternary
from lowbit.linalg.online import Hadamard
from lowbit.qat import latents
from lowbit.qat.base import Recipe, register
from lowbit.qat.latents import INPUT, Assignment, Stored
from lowbit.tree import Tree

# a4.8's inputs (eqs. 3 to 5); everything else gets four bits.
A48 = {"o_proj": "int8:token:bitnet:top50", "down_proj": "int8:token:bitnet"}
ROTATED = ("o_proj", "down_proj")
DEFAULTS = {"schedule": "two-stage", "lr_second": 2 / 3, "weight_decay": 0.1, "decay_until": 0.5}


def start(fmt: Format, w: jax.Array) -> tuple[Format, Params]:
    """Raises `InputError` for a format that is neither ternary nor one bit."""
    if not (isinstance(fmt, Ternary) or isinstance(fmt, Integer) and fmt.signs):
        raise InputError(f"format {fmt.name!r} with recipe bitnet (allowed: ternary, int1)")
    return fmt, {}


def prepare(
    params: Tree,
    assignment: Assignment,
    *,
    stored: Stored | None = None,
    inputs: Mapping[str, str] | None = None,
    other: str = "int8:token:bitnet",
    rotate: bool = False,
) -> Tree:
    """`latents.prepare` with an activation format for the input of every quantized weight that the plan gives none:
    `inputs` by the weight's last name, `other` for the rest. `rotate` first attaches the online transforms."""
    full: dict[str, Any] = dict(assignment)
    for path in [p for p, f in assignment.items() if isinstance(f, Format)]:
        name = path.rpartition(".")[2]
        if not path.endswith(("embed_tokens", "lm_head")):
            full.setdefault(path + INPUT, get_act((inputs or {}).get(name, other)))
    if rotate:
        params = trees.map_leaves(partial(_rotated, full), params)
    return latents.prepare(params, full, start, stored)


def _rotated(assignment: Mapping[str, Any], path: str, leaf: Any) -> Any:
    """A linear that reads what an orthonormal transform makes of its input, and the same function as before."""
    if (
        path not in assignment
        or not path.endswith(ROTATED)
        or (isinstance(leaf, PreparedInput) and leaf.op is not None)
    ):
        return leaf
    w = leaf.w if isinstance(leaf, PreparedInput) else leaf
    if not isinstance(w, jax.Array):
        return leaf  # refused by `latents.prepare`
    try:
        op = Hadamard(w.shape[1])
    except InputError as e:
        raise InputError(f"recipe bitnet-v2: input of {path}: {e}") from e
    rotated = PreparedInput(jax.jit(op.into)(w.astype(jnp.float32)), op=op)
    return rotated if not isinstance(leaf, PreparedInput) else dataclasses.replace(leaf, w=rotated.w, op=op)


register(Recipe("bitnet", prepare, latents.convert, DEFAULTS, restarts=True))
register(
    Recipe(
        "bitnet-a4.8", partial(prepare, inputs=A48, other="int4:token:bitnet"), latents.convert, DEFAULTS, restarts=True
    )
)
register(Recipe("bitnet-v2", partial(prepare, rotate=True), latents.convert, DEFAULTS, restarts=True))

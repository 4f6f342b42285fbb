"""GuidedQuant (arXiv 2505.07004): what an error of an output costs the model's loss, in the Hessian of each group of
outputs.

The loss to second order, with the Fisher matrix's blocks of single outputs, asks for `sum_o d_o^T H_o d_o`,
`H_o = sum_t (dloss / dz_to)^2 x_t x_t^T`; one matrix for each of G equal groups of outputs, the mean of its members',
stands for all of them (section 3). Gradients are those of the text's own cross-entropy in the unquantized model. Each
group is rounded by its Hessian as a weight of its own: scalar codebooks by LNQ (`lowbit.ptq.vptq`), grids with scales
for rows or groups by GPTQ.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, QTensor
from lowbit.formats.uniform import Uniform
from lowbit.kernels.qdot.probe import Probe
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.ptq import modelwise, rtn
from lowbit.ptq.base import register
from lowbit.ptq.blockwise import Solved, solver
from lowbit.ptq.gptq import gptq
from lowbit.ptq.options import GuidedOptions
from lowbit.ptq.vptq import vptq
from lowbit.tree import Tree
from lowbit.vq.vector import Vector


def guided(
    w_OI: Float[Array | np.ndarray, "O I"],
    H_GII: Float[Array | np.ndarray, "G _ _"],  # [G, I, I]
    fmt: Format,
    *,
    damping: float = 0.01,
    name: str = "weight",
) -> Solved:
    """`w` rounded group by group, each by its own Hessian; the error is the sum of theirs. Formats whose rows have
    nothing in common. Raises `InputError` for others, where G does not divide the rows, and as the solvers do."""
    check_format(fmt, "guided")
    fmt.check(w_OI.shape)
    groups = len(H_GII)
    if w_OI.shape[0] % groups:
        raise InputError(f"{name}: {groups} groups of {w_OI.shape[0]} outputs (allowed: a divisor)")
    solve = partial(vptq, turns=3, cycles=4) if isinstance(fmt, Vector) else partial(gptq, act_order=True)
    both = zip(np.split(np.asarray(w_OI, np.float32), groups), np.asarray(H_GII), strict=True)
    parts = [solve(w, H, fmt, damping=damping, name=name) for w, H in both]
    codes, stored = zip(*(fmt.unpack(p.q.arrays, p.q.shape) for p in parts), strict=True)
    rows = {k: jnp.concatenate([s[k] for s in stored]) for k in stored[0]}
    q = QTensor(fmt.pack(jnp.concatenate(codes), rows), fmt, (w_OI.shape[0], w_OI.shape[1]), "float32")
    most = max(p.damping for p in parts)
    return Solved(q, q.decode(), sum(p.error for p in parts), most, max(p.dead for p in parts))


def check_format(fmt: Format, solver: str) -> None:
    """Raises `InputError` for formats whose rows share something."""
    scalar = isinstance(fmt, Vector) and fmt.rows == fmt.size == 1
    alone = isinstance(fmt, Uniform) and fmt.idempotent and fmt.tile[0] == 1
    if not scalar and (not alone or getattr(fmt, "granularity", None) == "tensor"):
        allowed = "nuq1 .. nuq4, grids with scales for rows, groups or blocks"
        raise InputError(f"format {fmt.name!r} with solver {solver} (allowed: {allowed})")


def hessians(
    config: ModelConfig, params: Tree, paths: tuple[str, ...], tokens_BT: Int[np.ndarray, "B T"], groups: int
) -> dict[str, Float[Array, "G I I"]]:
    """`H_g` of these weights of a model, from one backward pass for each row of text, scaled to a mean diagonal of 1.
    Raises `InputError` naming the weight whose outputs `groups` does not divide, or that has no (finite) gradient."""
    flat = dict(trees.items(params))
    sums = {}
    for path in paths:
        O, I = modelwise.weight(flat[path]).shape
        if O % groups:
            raise InputError(f"{path}: {groups} groups of {O} outputs (allowed: a divisor)")
        sums[path] = jnp.zeros((groups, I, I), jnp.float32)
    for row in tokens_BT:
        sums = _add_sequence(config, flat, jnp.asarray(row), sums)
    for path, H_GII in sums.items():
        sizes = np.asarray(jnp.mean(jnp.diagonal(H_GII, axis1=1, axis2=2), axis=1), np.float64)
        for g in np.flatnonzero(~np.isfinite(sizes) | (sizes == 0)):
            what = "0 on all of the text" if sizes[g] == 0 else "not finite"
            raise InputError(f"the gradient of {path}, group {g} of its outputs, is {what} (allowed: finite, not 0)")
        sums[path] = H_GII / sizes.mean()
    return sums


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add_sequence(
    config: ModelConfig, flat: dict[str, Any], tokens_T: Int[Array, " T"], sums: dict[str, Array]
) -> dict[str, Array]:
    def loss(probes: dict[str, Array]) -> Array:
        own = {p: rtn.with_weight(flat[p], Probe(modelwise.weight(flat[p]), zeros)) for p, zeros in probes.items()}
        logp_TV = jax.nn.log_softmax(forward(trees.build({**flat, **own}), tokens_T[None], config)[0])
        return -jnp.sum(jnp.take_along_axis(logp_TV[:-1], tokens_T[1:, None], axis=1))

    new = jax.grad(loss)({p: jnp.zeros_like(a) for p, a in sums.items()})
    return {p: a + new[p] for p, a in sums.items()}


# -- the solver -------------------------------------------------------------------------------------------------------


def _find(
    config: ModelConfig, params: Tree, paths: tuple[str, ...], tokens_BT: Any, options: GuidedOptions
) -> dict[str, Array]:
    return hessians(config, params, paths, tokens_BT, options.groups)


def _solve_weight(w_OI: Any, H_GII: Any, fmt: Format, options: GuidedOptions, name: str) -> Solved:
    return guided(w_OI, H_GII, fmt, damping=options.damping, name=name)


register(solver(modelwise.Method("guided", GuidedOptions, _find, _solve_weight, check_format)))

"""DoReFa and PACT.

`dorefa` (Zhou et al. 2016, arXiv 1606.06160): weights squashed by tanh on the grid `dorefaN` (`int1:tensor` at one
bit), recomputed from the latent at every step. `pact` (Choi et al. 2018, arXiv 1805.06085): the same weights, as in the
paper, and inputs clipped at a learned alpha (a plan's `path:in` sites in `intN:pact`, or `intN:pact:pos` for those that
are not negative). The paper's L2 penalty on alpha is `TrainConfig.scale_decay`.
"""

import jax

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params
from lowbit.formats.dorefa import DoReFa
from lowbit.formats.integer import Integer
from lowbit.formats.learned import LearnedAct
from lowbit.qat import latents
from lowbit.qat.base import Recipe, register, register_start
from lowbit.qat.latents import INPUT, Assignment, Stored
from lowbit.tree import Tree


def start(fmt: Format, w: jax.Array) -> tuple[Format, Params]:
    """Raises `InputError` for a format that is not DoReFa's."""
    if not (isinstance(fmt, DoReFa) or isinstance(fmt, Integer) and fmt.signs):
        raise InputError(f"format {fmt.name!r} with recipe dorefa (allowed: dorefa2 to dorefa8, or int1 for one bit)")
    return fmt, {}


def prepare_pact(params: Tree, assignment: Assignment, *, stored: Stored | None = None) -> Tree:
    """`latents.prepare`; raises `InputError` for a plan without PACT inputs."""
    acts = [f for site, f in assignment.items() if site.endswith(INPUT)]
    if not any(isinstance(f, LearnedAct) and f.rule == "pact" for f in acts):
        raise InputError("recipe pact without inputs in intN:pact (allowed: a rule such as '.*:in' with int4:pact)")
    return latents.prepare(params, assignment, start, stored)


register_start("dorefa", start)
register(Recipe("pact", prepare_pact, latents.convert, {"scale_lr": 1.0}, restarts=True))

"""DoReFa and PACT: tanh-shaped weights, and inputs clipped at a learned value.

Paper: DoReFa-Net (arXiv 1606.06160), PACT (1805.06085). DoReFa alone leaves inputs as they are; PACT takes DoReFa's
    weights and inputs in [-a, a] whose a is learned under L2 decay.
Command: lowbit run experiments/dorefa.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 6 minutes for three seeds on 2 free CPU cores (estimated from single rows)
Expected numbers: docs/qat.md
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

grid = load(Path(__file__).with_name("qat.py"))


@dataclasses.dataclass(frozen=True)
class Config(grid.config):
    rows: tuple[str, ...] = (
        "dorefa dorefa4:g64",
        "dorefa dorefa3:g64",
        "dorefa dorefa2:g64",
        "dorefa int1:g64",
        "pact dorefa4:g64 int4:pact",
        "pact dorefa3:g64 int3:pact",
        "pact dorefa2:g64 int2:pact",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""


run = grid.run

"""PARQ and BinaryRelax: the optimizer takes the weights to the grid, the model is not edited.

Paper: PARQ (arXiv 2503.15748), BinaryRelax (1801.06313). Piecewise-affine regularisation whose slope grows over the
    run; at its end the weights lie on the grid.
Command: lowbit run experiments/proximal.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 10 minutes for three seeds on 2 free CPU cores (estimated from single rows)
Expected numbers: docs/qat.md
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

grid = load(Path(__file__).with_name("qat.py"))


@dataclasses.dataclass(frozen=True)
class Config(grid.config):
    rows: tuple[str, ...] = (
        "parq int4:g64",
        "parq int3:g64",
        "parq int2:g64",
        "parq ternary:g64",
        "parq int1:g64",
        "binary-relax int4:g64",
        "binary-relax int3:g64",
        "binary-relax int2:g64",
        "binary-relax ternary:g64",
        "binary-relax int1:g64",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""


run = grid.run

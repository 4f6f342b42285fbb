"""ParetoQ: 1-bit signs, stretched elastic quantization at 1.58 and 2 bits, LSQ's grid at 3 and 4.

Paper: arXiv 2502.02631. One scale a group, started at the published values and learned; beside it ParetoQ's 2-bit
    grid from a searched scale.
Command: lowbit run experiments/paretoq.py
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
        "paretoq int1:g64",
        "paretoq ternary:g64",
        "paretoq int2:g64:midrise",
        "ste-learned int2:g64:midrise:mse:paretoq",
        "paretoq int3:g64",
        "paretoq int4:g64",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""


run = grid.run

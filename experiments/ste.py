"""Straight-through estimation: scales fitted anew at every step, or started from a search and learned.

Paper: arXiv 1308.3432. `ste` fits absmax scales to the latents at each step; `ste-learned` starts where the squared
    error is least, with scales of either sign, and trains them by LSQ's gradient. Beside rounding and GPTQ.
Command: lowbit run experiments/ste.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 15 minutes for three seeds on 2 free CPU cores (estimated from single rows)
Expected numbers: docs/qat.md
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

grid = load(Path(__file__).with_name("qat.py"))


@dataclasses.dataclass(frozen=True)
class Config(grid.config):
    rows: tuple[str, ...] = (
        "rtn int4:g64",
        "gptq int4:g64:mse",
        "ste int4:g64",
        "ste-learned int4:g64:signmse:lsq",
        "rtn int3:g64",
        "gptq int3:g64:mse",
        "ste int3:g64",
        "ste-learned int3:g64:signmse:lsq",
        "rtn int2:g64",
        "gptq int2:g64:mse",
        "ste int2:g64",
        "ste-learned int2:g64:signmse:lsq",
        "rtn ternary:g64",
        "gptq ternary:g64",
        "ste ternary:g64",
        "ste-learned ternary:g64:lsq",
        "rtn int1:g64",
        "gptq int1:g64",
        "ste int1:g64",
        "ste-learned int1:g64",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""


run = grid.run

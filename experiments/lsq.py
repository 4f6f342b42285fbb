"""LSQ and LSQ+: learned steps (and offsets) of weights and inputs, at 4, 3 and 2 bits of both.

Paper: LSQ (arXiv 1902.08153), LSQ+ (2004.09576): weights and inputs in the same number of bits, gradient scale
    1/sqrt(N Qp), inputs with one step (LSQ+: and an offset) for a tensor, started on calibration text. Beside them
    inputs that are scaled for each token anew.
Command: lowbit run experiments/lsq.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 20 minutes for three seeds on 2 free CPU cores (estimated from single rows)
Expected numbers: docs/qat.md
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

grid = load(Path(__file__).with_name("qat.py"))


@dataclasses.dataclass(frozen=True)
class Config(grid.config):
    rows: tuple[str, ...] = (
        "rtn int4:g64 int4:token",
        "ste int4:g64 int4:token",
        "lsq int4:g64 int4:lsq",
        "lsq+ int4:g64 int4:lsq:asym",
        "rtn int3:g64 int3:token",
        "ste int3:g64 int3:token",
        "lsq int3:g64 int3:lsq",
        "lsq+ int3:g64 int3:lsq:asym",
        "rtn int2:g64 int2:token",
        "ste int2:g64 int2:token",
        "lsq int2:g64 int2:lsq",
        "lsq+ int2:g64 int2:lsq:asym",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""


run = grid.run

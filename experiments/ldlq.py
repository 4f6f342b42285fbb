"""Two bits without training: what rounding, incoherence and feedback on one side or on both are worth, in one table.

Paper: GPTQ (arXiv 2210.17323), QuIP# (2402.04396: "no E8" is the half-integer grid behind a randomized Hadamard
    transform with LDLQ), YAQA (2505.22988).
Command: lowbit run experiments/ldlq.py
Device: 2 CPU cores
Expected time: not measured alone; 33 minutes for six rows on cores shared with other work
Expected numbers: KL 0.218 of RTN, 0.112 of LDLQ, 0.094 of LDLQ or YAQA behind rotations (docs/vq_ldlq.md has all)
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

vq = load(Path(__file__).with_name("vq.py"))
GRID = "int2:channel:midrise:mse"


@dataclasses.dataclass(frozen=True)
class Config(vq.config):
    rows: tuple[str, ...] = (
        f"rtn {GRID}",
        f"rtn rht:{GRID}",
        f"gptq {GRID}",
        f"ldlq {GRID}",
        f"ldlq rht:{GRID}",
        f"ldlq rht128:blocks:{GRID}",
        f"ldlq rht:{GRID} sweeps=4",
        f"yaqa {GRID}",
        f"yaqa rht:{GRID}",
    )
    """Each "SOLVER FORMAT [OPTION=VALUE ...]", and the recipe that goes on from there if there is one."""


run = vq.run

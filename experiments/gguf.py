"""QAT on exactly the blocks that llama.cpp reads, for every GGUF type of 2 to 8 bits.

Purpose: each type rounded and trained (`ste-learned`: sub-block scales searched once, then learned) on lowbit-base,
    whose rows the K and ternary types divide. benchmarks/gguf_qat.py has llama.cpp's own quantizer beside it.
Command: lowbit run experiments/gguf.py
Device: 2 CPU cores
Expected time: 80 minutes for one seed on 2 CPU cores (estimated from single rows)
Expected numbers: docs/qat.md has q4_0, q2_k and tq2_0; the others were not run
"""

import dataclasses
from pathlib import Path

from lowbit.experiment.config import load

grid = load(Path(__file__).with_name("qat.py"))
Data, Opt = (grid.config.__dataclass_fields__[name].type for name in ("data", "opt"))


@dataclasses.dataclass(frozen=True)
class Config(grid.config):
    rows: tuple[str, ...] = (
        "rtn q4_0",
        "ste-learned q4_0:mse:lsq",
        "rtn q4_1",
        "ste-learned q4_1:lsq",
        "rtn q5_0",
        "ste-learned q5_0:mse:lsq",
        "rtn q5_1",
        "ste-learned q5_1:lsq",
        "rtn q8_0",
        "ste-learned q8_0:lsq",
        "rtn tq1_0",
        "ste-learned tq1_0:mse:lsq",
        "rtn tq2_0",
        "ste-learned tq2_0:mse:lsq",
        "rtn q2_k",
        "ste-learned q2_k:lsq",
        "rtn q3_k",
        "ste-learned q3_k:lsq",
        "rtn q4_k",
        "ste-learned q4_k:lsq",
        "rtn q5_k",
        "ste-learned q5_k:lsq",
        "rtn q6_k",
        "ste-learned q6_k:lsq",
        "rtn mxfp4",
        "ste-learned mxfp4",
    )
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""
    model: str = "lowbit-base"
    seeds: tuple[int, ...] = (0,)
    keep: tuple[str, ...] = ()
    data: Data = Data(eval_tokens=8192)
    opt: Opt = Opt(lr=5e-4, lr_high=1e-4, steps=160, batch_size=2)


run = grid.run

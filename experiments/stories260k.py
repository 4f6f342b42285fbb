"""The quickstart on karpathy's stories260K: a real pretrained model whose widths are awkward.

Purpose: 64 columns take blocks of 32 and 64, the MLP's 172 take none: `down_proj` stays bf16 by an explicit rule, and
    ternary is stored in Q2_0 (block 64), since TQ2_0 needs rows of 256.
Command: lowbit run experiments/stories260k.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 4 minutes on 2 CPU cores
Expected numbers: KL mean of RTN and QAT 0.075 and 0.033 at q4_0, 3.7 and 0.63 at int2:g64, 3.4 and 0.87 at ternary:g64
"""

import dataclasses
import os
from pathlib import Path

from lowbit.experiment.config import load

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"
quickstart = load(Path(__file__).with_name("quickstart.py"))
Data, Opt = (quickstart.config.__dataclass_fields__[name].type for name in ("data", "opt"))


@dataclasses.dataclass(frozen=True)
class Config(quickstart.config):
    model: str = str(SHARED / "models/stories260K/stories260K.bin")
    formats: tuple[str, ...] = ("q4_0", "int2:g64", "ternary:g64")
    keep: tuple[str, ...] = (r".*\.mlp\.down_proj",)
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt")
    opt: Opt = Opt(lr=3e-3, lr_high=3e-4, steps=48, batch_size=8)


run, dry_run = quickstart.run, quickstart.dry_run

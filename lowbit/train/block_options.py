"""Options of recipes' work before training, in a file that imports no jax: `lowbit train --help` shows them."""

import dataclasses
import math
from typing import Annotated

import tyro

from lowbit.errors import InputError

Rate = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """Block-AP: training block by block (recipes `block-ap` and `efficientqat`). The paper's rates (arXiv 2407.11062,
    section 4.1); it takes 4096 rows of 2048 tokens and 64 to validate."""

    rows: int = 128
    """Rows of tokens to train on, drawn without replacement."""
    valid_rows: int = 16
    """Further rows, which decide what epoch is kept."""
    length: int = 0
    """Tokens of a row (0: as --seq)."""
    epochs: int = 2
    """Passes over the rows, at most."""
    patience: int = 1
    """Epochs in a row without a lower validation error after which a block is done."""
    batch: int = 2
    """Rows of a step, and rows that are validated at once; divides both."""
    weight_lr: Rate = None
    """Peak learning rate of the weights (default: 2e-5 at less than 3 stored bits a weight, else 1e-5); 0 freezes."""
    quant_lr: float = 1e-4
    """Peak learning rate of scales and zero points; 0 freezes."""
    lr_end: float = 0.05
    """Final over peak rate of the cosine."""
    seed: int = 0
    """Of the draw and of the order of rows."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        for name in ("rows", "valid_rows", "epochs", "patience", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"blocks {name} is {getattr(self, name)} (allowed: at least 1)")
        for name in ("length", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"blocks {name} is {getattr(self, name)} (allowed: at least 0)")
        if self.length == 1:
            raise InputError("blocks length is 1 (allowed: 0, or at least 2)")
        for name in ("rows", "valid_rows"):
            if getattr(self, name) % self.batch:
                raise InputError(
                    f"blocks {name} is {getattr(self, name)} (allowed: multiples of blocks batch, {self.batch})"
                )
        for name in ("weight_lr", "quant_lr", "lr_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"blocks {name} is {value} (allowed: at least 0)")
        if self.lr_end > 1:
            raise InputError(f"blocks lr_end is {self.lr_end} (allowed: 0 to 1)")
        if self.weight_lr == 0 == self.quant_lr:
            raise InputError("blocks weight_lr and quant_lr are 0 (allowed: at least one above 0)")

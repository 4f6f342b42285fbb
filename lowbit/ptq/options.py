"""Options of solvers, in a file that imports no jax: `lowbit quantize --help` shows them."""

import dataclasses
import math
from typing import Literal

from lowbit.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class GptqOptions:
    """What GPTQ takes besides the plan and the text."""

    rows: int = 128
    """Rows of calibration tokens, drawn without replacement."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the draw."""
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to its diagonal."""
    order: Literal["act", "columns"] = "act"
    """act: columns by descending diagonal of H, groups fitted beforehand; columns: as they are, groups fitted when
    reached."""
    block: int = 128
    """Columns between updates of the rest, for formats without groups; changes speed and rounding only."""
    inputs: Literal["float", "quantized"] = "float"
    """quantized: the activation formats of the plan are applied while calibrating, too."""
    hessian: Literal["float32", "float64"] = "float32"
    """What H is accumulated in."""
    batch: int = 8
    """Rows that go through a layer at once."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        for name, least in (("rows", 1), ("length", 0), ("block", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"gptq {name} is {getattr(self, name)} (allowed: at least {least})")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 1):
            raise InputError(f"gptq damping is {self.damping} (allowed: 0 to 1)")
        for name, allowed in (
            ("order", ("act", "columns")),
            ("inputs", ("float", "quantized")),
            ("hessian", ("float32", "float64")),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(f"gptq {name}", getattr(self, name), allowed)

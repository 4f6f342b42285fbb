"""Fake quantization ops of activations, and the wrapper that attaches one to a linear."""

import dataclasses
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["act"])
@dataclasses.dataclass(frozen=True)
class QuantizedInput:
    """A linear's weight whose input is quantized first by `act` (the plan's `path:in` rule)."""

    w: Any
    act: Any

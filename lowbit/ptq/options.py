"""Options of solvers, in a file that imports no jax: `lowbit quantize --help` shows them."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from lowbit.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class GptqOptions:
    """What GPTQ takes besides the plan and the text."""

    solver: ClassVar[str] = "gptq"

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
    sweeps: int = 0
    """Times that every tile of columns is rounded again, given all others, afterwards; each costs about as much as the
    first round."""
    inputs: Literal["float", "quantized"] = "float"
    """quantized: the activation formats of the plan are applied while calibrating, too."""
    hessian: Literal["float32", "float64"] = "float32"
    """What H is accumulated in."""
    batch: int = 8
    """Rows that go through a layer at once."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        _check(
            self,
            {"rows": 1, "length": 0, "block": 1, "sweeps": 0, "batch": 1},
            {"order": ("act", "columns"), "inputs": ("float", "quantized"), "hessian": ("float32", "float64")},
        )


@dataclasses.dataclass(frozen=True)
class LdlqOptions(GptqOptions):
    """LDLQ is GPTQ with the columns as they are, which suits rotated weights: no column stands out there."""

    solver: ClassVar[str] = "ldlq"

    order: Literal["act", "columns"] = "columns"
    """columns: as they are, groups fitted when reached; act: by descending diagonal of H, groups fitted beforehand."""


@dataclasses.dataclass(frozen=True)
class YaqaOptions:
    """What YAQA takes besides the plan and the text."""

    solver: ClassVar[str] = "yaqa"

    rows: int = 512
    """Rows of calibration tokens, drawn without replacement; one gradient of the whole model for each. Quality rests on
    them: a few hundred at least."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the draw of rows and of the labels."""
    damping: float = 0.01
    """Share of the mean diagonal of both Hessians that is added to their diagonals."""
    rounds: int = 1
    """Passes over the rows; each after the first weighs one side's Hessian with the other's."""
    layers: int = 0
    """Layers whose Hessians are in memory at once, each such part with passes of its own (0: all)."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        _check(self, {"rows": 1, "length": 0, "rounds": 1, "layers": 0}, {})


@dataclasses.dataclass(frozen=True)
class GuidedOptions:
    """What GuidedQuant takes besides the plan and the text."""

    solver: ClassVar[str] = "guided"

    rows: int = 128
    """Rows of calibration tokens, drawn without replacement; one gradient of the whole model for each."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the draw."""
    damping: float = 0.01
    """Share of the mean diagonal of each Hessian that is added to its diagonal."""
    groups: int = 4
    """Groups of outputs, each with a Hessian of its own."""
    layers: int = 0
    """Layers whose Hessians are in memory at once, each such part with passes of its own (0: all)."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        _check(self, {"rows": 1, "length": 0, "groups": 1, "layers": 0}, {})


@dataclasses.dataclass(frozen=True)
class AqlmOptions:
    """What AQLM takes besides the plan and the text."""

    solver: ClassVar[str] = "aqlm"

    rows: int = 128
    """Rows of calibration tokens, drawn without replacement."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the draw, and of the order in which codes are searched."""
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to its diagonal."""
    beam: int = 4
    """States of a row that the search for codes keeps; 1: each code by itself, the fastest."""
    turns: int = 8
    """Times that codebooks and codes are fitted, at most."""
    tol: float = 0.01
    """Share of the error that a turn has to gain for another one."""
    inputs: Literal["float", "quantized"] = "float"
    """quantized: the activation formats of the plan are applied while calibrating, too."""
    hessian: Literal["float32", "float64"] = "float32"
    """What H is accumulated in."""
    batch: int = 8
    """Rows that go through a layer at once."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        _check(self, {"rows": 1, "length": 0, "beam": 1, "turns": 1, "batch": 1}, _WORDS)
        _check_tol(self)


@dataclasses.dataclass(frozen=True)
class VptqOptions:
    """What VPTQ takes besides the plan and the text."""

    solver: ClassVar[str] = "vptq"

    rows: int = 128
    """Rows of calibration tokens, drawn without replacement."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the draw."""
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to its diagonal."""
    order: Literal["act", "columns"] = "act"
    """act: columns by descending diagonal of H, codebooks fitted beforehand; columns: as they are, those of groups of
    columns fitted when reached."""
    turns: int = 4
    """Times that codebooks and codes are fitted after the first round, at most; 0: the first round is all."""
    cycles: int = 2
    """Times that each turn goes over the codes."""
    tol: float = 0.01
    """Share of the error that a turn has to gain for another one."""
    inputs: Literal["float", "quantized"] = "float"
    """quantized: the activation formats of the plan are applied while calibrating, too."""
    hessian: Literal["float32", "float64"] = "float32"
    """What H is accumulated in."""
    batch: int = 8
    """Rows that go through a layer at once."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        words = {"order": ("act", "columns"), **_WORDS}
        _check(self, {"rows": 1, "length": 0, "turns": 0, "cycles": 1, "batch": 1}, words)
        _check_tol(self)


@dataclasses.dataclass(frozen=True)
class LnqOptions(VptqOptions):
    """LNQ is the same for a codebook of scalars in each row, with its paper's turns."""

    solver: ClassVar[str] = "lnq"

    turns: int = 3
    """Times that codebooks and codes are fitted after the first round, at most; 0: the first round is all."""
    cycles: int = 4
    """Times that each turn goes over the codes."""


OPTIONS = {
    o.solver: o for o in (GptqOptions, LdlqOptions, YaqaOptions, GuidedOptions, AqlmOptions, VptqOptions, LnqOptions)
}
"""By the solver's name."""

_WORDS = {"inputs": ("float", "quantized"), "hessian": ("float32", "float64")}


def _check_tol(options: Any) -> None:
    if not (math.isfinite(options.tol) and 0 <= options.tol < 1):
        raise InputError(f"{options.solver} tol is {options.tol} (allowed: 0 to 1)")


def _check(options: Any, least: dict[str, int], words: dict[str, tuple[str, ...]]) -> None:
    """Raises `InputError` on counts below the least, words that are not allowed, and damping outside of 0 to 1."""
    solver = options.solver
    for name, low in least.items():
        if getattr(options, name) < low:
            raise InputError(f"{solver} {name} is {getattr(options, name)} (allowed: at least {low})")
    if not (math.isfinite(options.damping) and 0 <= options.damping <= 1):
        raise InputError(f"{solver} damping is {options.damping} (allowed: 0 to 1)")
    for name, allowed in words.items():
        if getattr(options, name) not in allowed:
            raise unknown(f"{solver} {name}", getattr(options, name), allowed)

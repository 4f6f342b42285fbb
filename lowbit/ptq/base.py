"""What a solver is, and the registry of solvers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lowbit.errors import unknown
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.tree import Tree


class Solve(Protocol):
    def __call__(
        self,
        model: Model,
        assignment: Mapping[str, Any],
        documents: list[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Tree:
        """The model's parameters with the sites of `assignment` (see `Plan.resolve`) packed; `documents` are the
        calibration text, `options` the solver's own (see `lowbit.ptq.options`). Raises `InputError`."""
        ...


class SolveFolder(Protocol):
    def __call__(
        self,
        src: str | Path,
        plan: Plan,
        out: str | Path,
        progress: Callable[[int, int], None] | None = None,
        documents: list[str] | None = None,
        **options: Any,
    ) -> None:
        """The same from a Hugging Face folder into a packed folder, with less than the model in memory."""
        ...


class Solver(NamedTuple):
    """How codes are chosen. `quantize_dir` is None where the whole model is needed at once."""

    name: str
    quantize: Solve
    quantize_dir: SolveFolder | None = None
    calibrates: bool = False  # whether it needs documents


_SOLVERS: dict[str, Solver] = {}


def register(solver: Solver) -> Solver:
    """Adds a solver under its name."""
    _SOLVERS[solver.name] = solver
    return solver


def get(name: str) -> Solver:
    """The solver of this name. Raises `InputError` with a suggestion."""
    _load_all()
    if name not in _SOLVERS:
        raise unknown("solver", name, _SOLVERS)
    return _SOLVERS[name]


def names() -> list[str]:
    """Names of all solvers."""
    _load_all()
    return list(_SOLVERS)


def _load_all() -> None:
    from lowbit.ptq import aqlm, gptq, guided, rtn, vptq, yaqa  # noqa: F401  (each module registers its solvers)

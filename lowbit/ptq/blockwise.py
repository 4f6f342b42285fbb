"""Solvers that calibrate on text and go through a model block by block: what all of them share.

A `Method` says how it starts: given where the model comes from, what is to be quantized and the tokens of the
calibration text, it is at work (`lowbit.ptq.folder.SolveBlock`), in memory or from a folder.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, QTensor
from lowbit.models import hf
from lowbit.models.cache import attach
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.ptq import rtn
from lowbit.ptq.base import Solver
from lowbit.ptq.calibrate import Readers, length_of, readers_of, tokenize
from lowbit.ptq.folder import SolveBlock, blocks_of, quantize_folder
from lowbit.tree import Tree


class Solved(NamedTuple):
    """A weight that a solver rounded."""

    q: QTensor
    w_hat_OI: Float[Array, "O I"]  # what `q` decodes to
    error: float  # tr((W - W_hat) H (W - W_hat)^T)
    damping: float  # share of the mean diagonal that was added to H: more than asked for where H needed it
    dead: int  # input channels that calibration never excites; their weights are rounded from 0


class Source(NamedTuple):
    """A model, wherever it lies."""

    config: ModelConfig
    readers: Readers
    params: Callable[[], Tree]  # all of it, in memory
    tokenizer: Any


@runtime_checkable
class Method(Protocol):
    """A solver's name, the dataclass of its options, and which formats it refuses, by `InputError`."""

    name: str
    options: type
    check: Callable[[Format, str], None]

    def start(
        self,
        source: Source,
        assignment: Mapping[str, Any],
        documents: list[str],
        tokens_BT: Int[np.ndarray, "B T"],
        options: Any,
    ) -> SolveBlock:
        """The solver at work, on what is to be quantized and with this text to calibrate on."""
        ...


def solver(method: Method) -> Solver:
    """The solver, for models in memory and for folders."""
    return Solver(method.name, partial(quantize, method), partial(quantize_dir, method), calibrates=True)


def quantize(
    method: Method,
    model: Model,
    assignment: Mapping[str, Any],
    documents: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tree:
    """The model's parameters with the sites of `assignment` packed, calibrated on `documents`. Raises `InputError`."""
    params, assignment = attach(model.params, assignment)
    rtn.check_paths(params, assignment)
    readers = readers_of(params)
    source = Source(model.config, readers, lambda: params, model.tokenizer)
    work, _ = _begin(method, source, assignment, documents, method.options(**options))
    known = model.config.shapes()
    blocks = blocks_of({path: readers[path] for path in (*known, *(p for p in readers if p not in known))})
    flat: dict[str, Any] = {}
    for n, block in enumerate(blocks, 1):
        flat |= work.solve(block)
        if progress is not None:
            progress(n, len(blocks))
    return trees.build(flat)


def quantize_dir(
    method: Method,
    src: str | Path,
    plan: Plan | Mapping[str, Any],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    documents: list[str] | None = None,
    **options: Any,
) -> None:
    """`quantize` from a folder into a packed folder, block by block (see `lowbit.ptq.folder`).

    What a solver knows of the text is computed again after an interruption, and the result has the same bits.
    """
    src, opts = Path(src), method.options(**options)
    config = hf.load_config(src)
    assignment = plan.resolve(config.shapes()) if isinstance(plan, Plan) else dict(plan)
    source = Source(config, hf.readers(src), lambda: hf.load_hf(src).params, hf.load_tokenizer(src))
    work, tokens_BT = _begin(method, source, assignment, documents, opts)
    text = hashlib.sha256(tokens_BT.tobytes()).hexdigest()
    key = {"solver": method.name, "options": dataclasses.asdict(opts), "tokens": text}
    quantize_folder(src, Path(out), work, assignment, key, progress)


def _begin(
    method: Method, source: Source, assignment: Mapping[str, Any], documents: list[str] | None, options: Any
) -> tuple[SolveBlock, Any]:
    if documents is None:
        raise InputError(f"solver {method.name} without calibration text (allowed: documents)")
    for fmt in {f for f in assignment.values() if isinstance(f, Format)}:
        method.check(fmt, method.name)
    length = length_of(source.config, options.length)
    tokens_BT = tokenize(documents, source.tokenizer, options.rows, length, options.seed)
    return method.start(source, assignment, documents, tokens_BT, options), tokens_BT


def note(text: str) -> None:
    """Says something to whoever runs the program."""
    print(f"lowbit: note: {text}", file=sys.stderr)

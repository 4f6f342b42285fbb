"""Solvers that know what a weight does to the whole model: what they share.

Something of every weight's Hessian (a `Method` says what) is computed from gradients of the unquantized model before
anything is rounded, then each weight is rounded by its own. Unlike in `lowbit.ptq.layerwise`, later layers do not make
up for earlier ones. Weights outside of the layers are rounded to nearest. Static activation formats get their range
from the same text.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.cache import CacheSite, attach
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import INPUT, Plan
from lowbit.ptq import rtn
from lowbit.ptq.base import Solver
from lowbit.ptq.calibrate import Readers, length_of, readers_of, tokenize
from lowbit.ptq.folder import Block, quantize_folder
from lowbit.ptq.layerwise import Solved, note
from lowbit.tree import Tree


@runtime_checkable
class Find(Protocol):
    def __call__(
        self, config: ModelConfig, params: Tree, paths: tuple[str, ...], tokens_BT: Int[np.ndarray, "B T"], options: Any
    ) -> dict[str, Any]:
        """What `solve` needs of each of these weights. Raises `InputError` with the weight's name."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A solver by Hessians of the whole model: its name, the dataclass of its options, what it finds and what it does
    to a weight, `solve(w, found, fmt, options, name)`; `check(fmt, name)` refuses formats that it cannot round."""

    name: str
    options: type
    find: Find
    solve: Callable[[Any, Any, Format, Any, str], Solved]
    check: Callable[[Format, str], None]


def solver(method: Method) -> Solver:
    """The solver of a method, for models in memory and for folders."""
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
    opts = method.options(**options)
    solver = _Blocks(method, model.config, readers, lambda: params, assignment, documents, model.tokenizer, opts)
    flat: dict[str, Any] = {}
    for n, (path, read) in enumerate(readers.items(), 1):
        flat |= solver.solve({path: read})
        if progress is not None:
            progress(n, len(readers))
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
    """`quantize` from a folder into a packed folder, layer by layer (see `lowbit.ptq.folder`). The Hessians need the
    whole model in memory; after an interruption they are computed again, to the same bits."""
    src, opts = Path(src), method.options(**options)
    config = hf.load_config(src)
    assignment = plan.resolve(config.shapes()) if isinstance(plan, Plan) else dict(plan)
    whole, tokenizer = (lambda: hf.load_hf(src).params), hf.load_tokenizer(src)
    solver = _Blocks(method, config, hf.readers(src), whole, assignment, documents, tokenizer, opts)
    text = hashlib.sha256(solver.tokens_BT.tobytes()).hexdigest()
    key = {"solver": method.name, "options": dataclasses.asdict(opts), "tokens": text}
    quantize_folder(src, Path(out), solver, assignment, key, progress)


def weight(leaf: Any) -> Any:
    """The matrix of a leaf whose input may be prepared."""
    return leaf.w if isinstance(leaf, PreparedInput) else leaf


class _Blocks:
    """A method at work on a model, block after block (see `lowbit.ptq.folder.SolveBlock`)."""

    def __init__(
        self,
        method: Method,
        config: ModelConfig,
        readers: Readers,
        params: Callable[[], Tree],
        assignment: Mapping[str, Any],
        documents: list[str] | None,
        tokenizer: Any,
        options: Any,
    ):
        if documents is None:
            raise InputError(f"solver {method.name} without calibration text (allowed: documents)")
        for fmt in {f for f in assignment.values() if isinstance(f, Format)}:
            method.check(fmt, method.name)
        self.method, self.config, self.params = method, config, params
        self.assignment, self.options = assignment, options
        length = length_of(config, options.length)
        self.tokens_BT = tokenize(documents, tokenizer, options.rows, length, options.seed)
        self.stored = rtn.ranges(config, readers, tokenizer, assignment, documents)
        self.found: dict[str, Any] = {}

    def solve(self, block: Block) -> Iterator[tuple[str, Any]]:
        for path, read in block.items():
            leaf = read()
            if isinstance(leaf, CacheSite):
                yield path, leaf
                continue
            fmt, act = self.assignment.get(path), self.assignment.get(path + INPUT)
            if fmt is None or not re.match(r"model\.layers\.\d+\.", path):
                if fmt is not None:
                    note(f"{path} is outside of the layers: rounded to nearest")
                yield path, rtn.quantize_leaf(path, leaf, self.assignment, self.stored)
                continue
            rtn.check_leaf(path, leaf, fmt, act)
            r = self.method.solve(weight(leaf), self._found(path), fmt, self.options, path)
            if r.dead:
                note(f"{path}: {r.dead} input channels have no part in the loss; weights set to 0")
            if r.damping != self.options.damping:
                note(f"{path}: its Hessian needed damping {r.damping:g} instead of {self.options.damping:g}")
            leaf = rtn.with_weight(leaf, r.q)
            yield path, leaf if act is None else rtn.with_act(leaf, act, self.stored.get(path))

    def passed(self, block: Block) -> None:
        pass

    def _found(self, path: str) -> Any:
        """Of one weight; computed for as many layers at once as the options say."""
        if path not in self.found:
            known = self.config.shapes()
            layers = {
                p: int(m[1])
                for p, f in self.assignment.items()
                if isinstance(f, Format) and p in known and (m := re.match(r"model\.layers\.(\d+)\.", p))
            }
            count = self.options.layers or self.config.num_layers
            paths = tuple(p for p, i in layers.items() if i // count == layers[path] // count)
            self.found = {}  # before the next part is computed
            self.found = self.method.find(self.config, self.params(), paths, self.tokens_BT, self.options)
        return self.found[path]

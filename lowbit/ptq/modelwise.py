"""Solvers that know what a weight does to the whole model: what they share.

Something of every weight's Hessian (a `Method` says what) is computed from gradients of the unquantized model before
anything is rounded, then each weight is rounded by its own. Unlike in `lowbit.ptq.layerwise`, later layers do not make
up for earlier ones. Weights outside of the layers are rounded to nearest. Static activation formats get their range
from the same text.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lowbit.formats.base import Format
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.plan import INPUT
from lowbit.ptq import rtn
from lowbit.ptq.blockwise import Solved, Source, note
from lowbit.ptq.folder import Block, SolveBlock
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

    def start(self, *given: Any) -> SolveBlock:
        """See `lowbit.ptq.blockwise.Method`."""
        return _Blocks(self, *given)


def weight(leaf: Any) -> Any:
    """The matrix of a leaf whose input may be prepared."""
    return leaf.w if isinstance(leaf, PreparedInput) else leaf


class _Blocks:
    """A method at work on a model, block after block (see `lowbit.ptq.folder.SolveBlock`)."""

    def __init__(
        self,
        method: Method,
        source: Source,
        assignment: Mapping[str, Any],
        documents: list[str],
        tokens_BT: Int[np.ndarray, "B T"],
        options: Any,
    ):
        self.method, self.config, self.params = method, source.config, source.params
        self.assignment, self.tokens_BT, self.options = assignment, tokens_BT, options
        self.stored = rtn.ranges(source.config, source.readers, source.tokenizer, assignment, documents)
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

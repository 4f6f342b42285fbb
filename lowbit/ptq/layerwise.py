"""Solvers that go through a model layer by layer, each weight by the Hessian of its inputs: what they share.

Of each layer first q, k and v, then o, then gate and up, then down: every Hessian is that of inputs which come through
what is quantized already. Weights outside of the layers are rounded to nearest. Static activation formats get their
range from the same text.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lowbit import tree as trees
from lowbit.formats.base import Format
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg.online import describe
from lowbit.plan import INPUT
from lowbit.ptq import rtn
from lowbit.ptq.blockwise import Solved, Source, note
from lowbit.ptq.calibrate import STAGES, Stream, linears, working
from lowbit.ptq.folder import Block, SolveBlock
from lowbit.tree import Tree


@runtime_checkable
class SolveWeight(Protocol):
    def __call__(self, w_OI: Any, H_II: Any, fmt: Format, options: Any, name: str) -> Solved:
        """One weight, for the Hessian of its inputs. Raises `InputError` with the name."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A layerwise solver: its name, the dataclass of its options (see `GptqOptions`), and what it does to a weight;
    `check(fmt, name)` refuses formats that it cannot round."""

    name: str
    options: type
    solve: SolveWeight
    check: Callable[[Format, str], None]

    def start(self, *given: Any) -> SolveBlock:
        """See `lowbit.ptq.blockwise.Method`."""
        return _Blocks(self, *given)


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
        self.method, self.config, self.assignment, self.options = method, source.config, assignment, options
        self.stream = Stream(source.config, tokens_BT, options.batch)
        self.acts = options.inputs == "quantized"

    def solve(self, block: Block) -> Iterator[tuple[str, Any]]:
        if (index := _layer_of(block)) is not None:
            yield from self._layer(index, {path: read() for path, read in block.items()}).items()
            return
        for path, read in block.items():
            leaf = rtn.quantize_leaf(path, read(), self.assignment)
            if path in self.assignment:
                note(f"{path} is outside of the layers: rounded to nearest")
            if path == "model.embed_tokens":
                self.stream.start(leaf)
            yield path, leaf

    def passed(self, block: Block) -> None:
        if (index := _layer_of(block)) is not None:
            leaves = {path: read() for path, read in block.items()}
            self.stream.advance(working(_relative(index, leaves), self.acts), index)
        elif "model.embed_tokens" in block:
            self.stream.start(block["model.embed_tokens"]())

    def _layer(self, index: int, leaves: dict[str, Any]) -> dict[str, Any]:
        layer = working(_relative(index, leaves), self.acts)
        for stage in STAGES:
            self._stage(index, stage, leaves, layer)
        if index + 1 < self.config.num_layers:
            self.stream.advance(layer, index)
        return leaves

    def _stage(self, index: int, stage: tuple[str, ...], leaves: dict[str, Any], layer: Tree) -> None:
        """Quantizes linears whose inputs do not depend on one another, in `leaves` and in the stream's `layer`."""
        paths = {n: f"model.layers.{index}.{linears(self.config)[n]}" for n in stage}
        wanted = {n: (self.assignment.get(p), self.assignment.get(p + INPUT)) for n, p in paths.items()}
        for n, path in paths.items():
            rtn.check_leaf(path, leaves[path], *wanted[n])
        static = [n for n, (_, act) in wanted.items() if act is not None and act.static]
        stats = self.stream.stats(layer, index, static) if static else {}
        for n, (_, act) in wanted.items():
            if act is not None:
                params = act.fit(stats[n].high_I, stats[n].low_I, stats[n].absmean_I) if n in stats else {}
                leaves[paths[n]] = rtn.with_act(leaves[paths[n]], act, params)
                if self.acts:
                    self._put(layer, n, rtn.with_act(self._at(layer, n), act, params))
        first: dict[Any, str] = {}  # linears whose inputs are prepared alike share a Hessian
        shared = {n: first.setdefault(_preparation(self._at(layer, n)), n) for n, (fmt, _) in wanted.items() if fmt}
        dtype = np.dtype(self.options.hessian)
        hessians = self.stream.hessians(layer, index, tuple(first.values()), dtype) if first else {}
        for n, owner in shared.items():
            path, now = paths[n], self._at(layer, n)
            w = now.w if isinstance(now, PreparedInput) else now
            r = self.method.solve(w, hessians[owner], wanted[n][0], self.options, path)
            leaves[path] = rtn.with_weight(leaves[path], r.q)
            self._put(layer, n, rtn.with_weight(now, r.w_hat_OI))
            if r.dead:
                note(f"{path}: {r.dead} of {w.shape[1]} input channels are 0 in all of the text; weights set to 0")
            if r.damping != self.options.damping:
                note(f"{path}: its Hessian needed damping {r.damping:g} instead of {self.options.damping:g}")

    def _at(self, layer: Tree, name: str) -> Any:
        part, key = linears(self.config)[name].split(".")
        return layer[part][key]

    def _put(self, layer: Tree, name: str, leaf: Any) -> None:
        part, key = linears(self.config)[name].split(".")
        layer[part][key] = leaf


def _layer_of(block: Block) -> int | None:
    m = re.match(r"model\.layers\.(\d+)\.", next(iter(block)))
    return None if m is None else int(m[1])


def _relative(index: int, leaves: Mapping[str, Any]) -> Tree:
    return trees.build({path.removeprefix(f"model.layers.{index}."): leaf for path, leaf in leaves.items()})


def _preparation(leaf: Any) -> tuple[Any, ...]:
    """What is done to a linear's input, as something to compare."""
    if not isinstance(leaf, PreparedInput):
        return ()
    names, arrays = describe(leaf)
    return (*sorted(names.items()), *((k, np.asarray(a).tobytes()) for k, a in sorted(arrays.items())))

"""Round to nearest: every weight takes the nearest code of its format, whose parameters are fitted to it alone.

No error feedback, and data only for the range of static activation formats; the baseline of every other solver.
`quantize` works on a parameter tree in memory,
`quantize_dir` goes through a Hugging Face folder block by block and resumes where it was interrupted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Format, Latent, Params, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.cache import CacheSite, attach
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import INPUT, Plan
from lowbit.ptq.base import Solver, register
from lowbit.ptq.calibrate import Readers, length_of, readers_of, statistics, tokenize
from lowbit.ptq.folder import Block, quantize_folder
from lowbit.tree import Tree

ROWS = 128  # of calibration text, at most, for the range of static activation formats
Stored = Mapping[str, Mapping[str, Any]]  # {path: arrays that the activation format of its input stores}


def encode(fmt: Format, w_OI: Any) -> QTensor:
    """`fmt.encode` in one compiled program, of the weight in float32: decoding then gives codes times scales exactly,
    with no rounding to the dtype that `w` had. Raises `FormatError` like `Format.encode`."""
    w = jnp.asarray(w_OI)
    fmt.check(w.shape)
    q, params = _encode(fmt, w)
    fmt.check_values(w, params)
    return q


@partial(jax.jit, static_argnames="fmt")
def _encode(fmt: Format, w: Float[Array, "O I"]) -> tuple[QTensor, Params]:
    w32 = w.astype(jnp.float32)
    params = fmt.fit_block(w32)  # the hook of every solver: here one block is the whole matrix
    codes, _ = fmt.round_block(w32, params)
    return QTensor(fmt.pack(codes, fmt.stored(params)), fmt, w.shape, "float32"), params


def quantize(params: Tree, assignment: Mapping[str, Any], stored: Stored | None = None) -> Tree:
    """`params` with each weight named in `assignment` (`Plan.resolve`) packed in its format; `path:in` entries
    attach the activation format (static ones with their arrays, `stored`; see `ranges`), caches theirs. Weights that
    are packed already, and paths that do not exist, raise `InputError`."""
    params, assignment = attach(params, assignment)
    check_paths(params, assignment)
    return trees.map_leaves(lambda path, leaf: quantize_leaf(path, leaf, assignment, stored), params)


def ranges(
    config: ModelConfig, read: Readers, tokenizer: Any, assignment: Mapping[str, Any], documents: list[str] | None
) -> Stored:
    """`{path: arrays}` of the static activation formats in an assignment: what their inputs reach on `ROWS` rows of the
    text, or on all there are, one layer at a time, with weights as they are. Empty without text or static formats."""
    static = {site.removesuffix(INPUT): fmt for site, fmt in assignment.items() if getattr(fmt, "static", False)}
    if not static or documents is None:
        return {}
    tokens = tokenize(documents, tokenizer, ROWS, length_of(config), least=1)
    stats = statistics(config, read, tokens)
    found = {path: (fmt, stats[path]) for path, fmt in static.items() if path in stats}
    return {path: fmt.fit(s.high_I, s.low_I, s.absmean_I) for path, (fmt, s) in found.items()}


def check_paths(params: Tree, assignment: Mapping[str, Any]) -> None:
    """Raises `InputError` for a format of something that is not in the tree."""
    paths = {p for p, _ in trees.items(params)}
    if stray := sorted(s for s in assignment if s.removesuffix(INPUT) not in paths):
        raise InputError(f"format for {stray[0]!r}, which is no weight (allowed: {', '.join(sorted(paths)[:3])}, ...)")


def quantize_leaf(path: str, leaf: Any, assignment: Mapping[str, Any], stored: Stored | None = None) -> Any:
    """One parameter of `quantize`; the online transform of its input stays."""
    fmt, act = assignment.get(path), assignment.get(path + INPUT)
    check_leaf(path, leaf, fmt, act)
    if fmt is not None:
        leaf = with_weight(leaf, encode(fmt, leaf.w if isinstance(leaf, PreparedInput) else leaf))
    return leaf if act is None else with_act(leaf, act, (stored or {}).get(path))


def check_leaf(path: str, leaf: Any, fmt: Any, act: Any) -> None:
    """Raises `InputError` where a weight or an input would be quantized twice."""
    prepared = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
    if fmt is not None and isinstance(prepared.w, Adapter):
        raise InputError(f"{path} has an adapter (allowed: float weights; merge the adapter first)")
    if fmt is not None and isinstance(prepared.w, QTensor | Latent | Coded):
        raise InputError(f"{path} is quantized already (allowed: float weights; nothing is quantized twice)")
    if act is not None and prepared.act is not None:
        raise InputError(f"the input of {path} is quantized already (allowed: one activation format)")


def with_weight(leaf: Any, w: Any) -> Any:
    """A leaf with another weight, its input prepared as before."""
    return dataclasses.replace(leaf, w=w) if isinstance(leaf, PreparedInput) else w


def with_act(leaf: Any, act: Any, params: Mapping[str, Any] | None = None) -> PreparedInput:
    """A leaf whose input is also quantized, by `act` with the arrays that it stores."""
    prepared = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
    return dataclasses.replace(prepared, act=act, params=dict(params or {}))


# -- folders ----------------------------------------------------------------------------------------------------------


def quantize_dir(
    src: str | Path,
    plan: Plan | Mapping[str, Any],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    documents: list[str] | None = None,
) -> None:
    """Quantizes the folder `src` into the packed folder `out`, with one tensor and its codes in memory at a time.

    Resumes after an interruption and counts blocks with `progress`: see `lowbit.ptq.folder`. Raises `InputError`; `out`
    then holds what it held before.
    """
    src = Path(src)
    config = hf.load_config(src)
    assignment = plan.resolve(config.shapes()) if isinstance(plan, Plan) else dict(plan)
    stored = ranges(config, hf.readers(src), hf.load_tokenizer(src), assignment, documents)
    key = {"solver": "rtn", "ranges": {p: {k: float(a) for k, a in own.items()} for p, own in stored.items()}}
    quantize_folder(src, Path(out), _Blocks(assignment, stored), assignment, key, progress)


class _Blocks(NamedTuple):
    """What `quantize_folder` asks of a solver: here every parameter is on its own."""

    assignment: Mapping[str, Any]
    stored: Stored

    def solve(self, block: Block) -> Iterator[tuple[str, Any]]:
        for path, read in block.items():
            leaf = read()
            yield path, leaf if isinstance(leaf, CacheSite) else quantize_leaf(path, leaf, self.assignment, self.stored)

    def passed(self, block: Block) -> None:
        pass


def _solve(model: Model, assignment: Mapping[str, Any], documents: Any = None, progress: Any = None) -> Tree:
    stored = ranges(model.config, readers_of(model.params), model.tokenizer, assignment, documents)
    return quantize(model.params, assignment, stored)


register(Solver("rtn", _solve, quantize_dir))

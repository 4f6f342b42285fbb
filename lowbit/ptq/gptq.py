"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for the error.

With `H = 2/n sum x x^T` of a linear's inputs, the error of its outputs is `tr((W - W_hat) H (W - W_hat)^T)`. Factor
`H = R R^T`, R upper triangular (a Cholesky factorization from the last column on); then it is

    sum_k |(W_k + sum_{j<k} (W_j - W_hat_j) R_jk R_kk^-1 - W_hat_k) R_kk|^2

over tiles k of columns, and rounding the bracket's first part for k = 0, 1, ... makes each term as small as its grid
allows. That is LDLQ (QuIP, arXiv 2307.13304), which equals GPTQ: the inverse's upper Cholesky factor, which the paper
computes, is `U = R^-1`. It is never formed here, only its diagonal blocks, and so a third of the arithmetic and no
inverse of an ill-conditioned matrix remain. Inside of a block of columns the update is the paper's,
`W_rest -= (W_k - W_hat_k) U_kk^-1 U_k,rest`; with tiles of several columns this is LDLQ with block feedback.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Params, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg.online import describe
from lowbit.models import hf
from lowbit.models.cache import attach
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import INPUT, Plan
from lowbit.ptq import rtn
from lowbit.ptq.base import Solver, register
from lowbit.ptq.calibrate import STAGES, Stream, length_of, linears, readers_of, tokenize, working
from lowbit.ptq.folder import Block, blocks_of, quantize_folder
from lowbit.ptq.options import GptqOptions
from lowbit.tree import Tree

HIGHEST = jax.lax.Precision.HIGHEST
MOST_DAMPING = 1.0


class Solved(NamedTuple):
    """A weight that GPTQ rounded."""

    q: QTensor
    w_hat_OI: Float[Array, "O I"]  # what `q` decodes to
    error: float  # tr((W - W_hat) H (W - W_hat)^T)
    damping: float  # share of the mean diagonal that was added to H: more than asked for where H needed it
    dead: int  # input channels that calibration never excites; their weights are rounded from 0


def gptq(
    w_OI: Float[Array | np.ndarray, "O I"],
    H_II: Float[Array | np.ndarray, "_ _"],  # [I, I]
    fmt: Format,
    *,
    block: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    name: str = "weight",
) -> Solved:
    """Rounds `w` to `fmt` for the least error in the norm of `H`; codes and parameters are packed as they were chosen.

    Parameters of a format with groups are fitted when their first column is reached, to the weights as updated by
    then; those of a whole row or tensor once, beforehand. `act_order` takes columns by descending `H_ii`; groups stay
    those of neighbouring columns and are fitted beforehand, so the layout is the ordinary one. `diag(H)` is the
    importance that searched fits get.

    `damping` times the mean of `diag(H)` is added to the diagonal; where `H` is not positive definite still, ten times
    as much, up to 1.0. Raises `InputError` (with `name`) on values that are not finite, on an `H` of another shape or
    one that even then has no factor, and as the format's `check` and `check_values` do.
    """
    check_format(fmt)
    fmt.check(w_OI.shape)
    O, I = w_OI.shape
    if tuple(H_II.shape) != (I, I):
        raise InputError(f"Hessian of {name} has shape {list(H_II.shape)} (allowed: [{I}, {I}], as its weight's rows)")
    diagonal = np.asarray(jnp.diagonal(jnp.asarray(H_II)), np.float64)
    if not np.isfinite(diagonal).all() or not bool(jnp.isfinite(H_II).all()):
        raise InputError(f"Hessian of {name} holds NaN or infinite values (allowed: finite ones)")
    w = jnp.asarray(w_OI, jnp.float32)
    if not bool(jnp.isfinite(w).all()):
        raise InputError(f"{name} holds NaN or infinite values (allowed: finite weights)")
    tile = fmt.tile[1]
    order = np.arange(I)
    if act_order:
        tiles = np.argsort(-diagonal.reshape(-1, tile).sum(1), kind="stable")
        order = (tiles[:, None] * tile + np.arange(tile)).reshape(-1)
    R, added, damping = _factor(H_II, diagonal, order, damping, name)
    span = fmt.params_span((O, I))
    refit = span < I and not act_order
    width = span if refit else tile * _divisor(I // tile, max(1, block // tile))
    dead = diagonal == 0
    w = jnp.where(jnp.asarray(dead), 0.0, w)
    importance = jnp.asarray(diagonal, jnp.float32)
    arrays, params, w_hat, error = _solve(fmt, width, refit, w, R, jnp.asarray(order), importance, added)
    fmt.check_values(w, params)
    return Solved(QTensor(arrays, fmt, (O, I), "float32"), w_hat, float(error), damping, int(dead.sum()))


def quadratic_error(w_OI: Any, w_hat_OI: Any, H_II: Any) -> float:
    """`tr((W - W_hat) H (W - W_hat)^T)` in float64 on the host."""
    d = np.asarray(w_OI, np.float64) - np.asarray(w_hat_OI, np.float64)
    return float(np.sum((d @ np.asarray(H_II, np.float64)) * d))


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _factor(
    H_II: Any, diagonal: np.ndarray, order: np.ndarray, damping: float, name: str
) -> tuple[Array, Array, float]:
    """`(R, what was added to the diagonal, damping)` with `R R^T = H + diag(added)` in the given order of columns."""
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while True:
        added = jnp.asarray(np.where(live, 0.0, mean) + damping * mean, jnp.float32)
        R = _reverse_cholesky(jnp.asarray(H_II, jnp.float32), jnp.asarray(order), added)
        if bool(jnp.isfinite(R).all()):
            return R, added, damping
        if damping >= MOST_DAMPING:
            raise InputError(
                f"Hessian of {name} is not positive definite with damping {damping:g} (allowed: sums of x x^T)"
            )
        damping = min(MOST_DAMPING, 10 * damping or 0.001)


@jax.jit
def _reverse_cholesky(H_II: Float[Array, "I I"], order_I: Array, added_I: Array) -> Float[Array, "I I"]:
    H = (H_II + jnp.diag(added_I))[order_I][:, order_I]
    return jnp.flip(jax.lax.linalg.cholesky(jnp.flip(H), symmetrize_input=False))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    fmt: Format,
    width: int,
    refit: bool,
    w_OI: Float[Array, "O I"],
    R_II: Float[Array, "I I"],
    order_I: Int[Array, " I"],
    importance_I: Float[Array, " I"],
    added_I: Float[Array, " I"],
) -> tuple[dict[str, Array], Params, Float[Array, "O I"], Float[Array, ""]]:
    """`(packed arrays, params, w_hat, quadratic error)`, blocks of `width` columns; `refit`: each with its own params.

    Works on transposed matrices, in which the columns of a tile are contiguous, and gathers what a tile needs (one
    product) instead of handing on what a tile leaves (a pass over the block): three times as fast on a CPU.
    """
    O, I = w_OI.shape
    t = fmt.tile[1]
    params = None if refit else fmt.fit_block(w_OI, importance_I)
    kept = None if refit else fmt.stored(params)
    w_IO = rearrange(w_OI, "o i -> i o")[order_I]
    chunk = width * _divisor(I // width, max(1, 512 // width))  # of the columns so far, so that none to come are read

    def one_block(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], Any]:
        d_IO, loss_O = carry  # W - W_hat of the columns so far, zero in those to come
        start, columns_W, weight_W = xs
        w_WO = jax.lax.dynamic_slice_in_dim(w_IO, start, width)
        R_IW = jax.lax.dynamic_slice_in_dim(R_II, start, width, axis=1)
        R_WW = jax.lax.dynamic_slice_in_dim(R_IW, start, width)
        tiles = jnp.arange(width // t)
        R_ktt = rearrange(R_WW, "(k t) (j s) -> k j t s", t=t, s=t)[tiles, tiles]
        U_WW = jax.lax.linalg.triangular_solve(R_WW, jnp.eye(width), left_side=True, lower=False)
        F_WW = jnp.einsum("kts,ksw->ktw", R_ktt, rearrange(U_WW, "(k s) w -> k s w", s=t), precision=HIGHEST)
        F_WW = rearrange(F_WW, "k t w -> (k t) w")  # U_kk^-1 U_k,rest in the rows of tile k

        def add(j: Array, far_WO: Array) -> Array:
            R_CW = jax.lax.dynamic_slice_in_dim(R_IW, j * chunk, chunk)
            d_CO = jax.lax.dynamic_slice_in_dim(d_IO, j * chunk, chunk)
            return far_WO + jnp.einsum("cw,co->wo", R_CW, d_CO, precision=HIGHEST)

        far_WO = jax.lax.fori_loop(0, (start + chunk - 1) // chunk, add, jnp.zeros((width, O), jnp.float32))
        now_WO = w_WO + jnp.einsum("vw,vo->wo", U_WW, far_WO, precision=HIGHEST)
        own = fmt.fit_block(rearrange(now_WO, "w o -> o w"), weight_W) if refit else params
        stored = fmt.stored(own) if refit else kept  # a tile has less than what shares a parameter in k-quants

        def one_tile(k: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            e_WO, codes_WO, hats_WO, loss_O = state
            F_Wt = jax.lax.dynamic_slice_in_dim(F_WW, k * t, t, axis=1)
            near_tO = jnp.einsum("wt,wo->to", F_Wt, e_WO, precision=HIGHEST)
            w_tO = jax.lax.dynamic_slice_in_dim(now_WO, k * t, t) - near_tO
            column = k * t if refit else columns_W[k * t]
            at = _params_at(stored, column, width if refit else I)
            code_tO, hat_tO = (rearrange(a, "o t -> t o") for a in fmt.round_block(rearrange(w_tO, "t o -> o t"), at))
            e_tO = w_tO - hat_tO
            loss_O += jnp.sum(jnp.square(jnp.einsum("to,ts->so", e_tO, R_ktt[k], precision=HIGHEST)), axis=0)
            new = ((e_WO, e_tO), (codes_WO, code_tO), (hats_WO, hat_tO))
            return *(jax.lax.dynamic_update_slice_in_dim(a, b, k * t, axis=0) for a, b in new), loss_O

        zeros = jnp.zeros((width, O), jnp.float32)
        state = (zeros, zeros.astype(jnp.int32), zeros, loss_O)
        _, codes_WO, hats_WO, loss_O = jax.lax.fori_loop(0, width // t, one_tile, state)
        d_IO = jax.lax.dynamic_update_slice_in_dim(d_IO, w_WO - hats_WO, start, axis=0)
        return (d_IO, loss_O), (codes_WO, hats_WO, own if refit else {})

    xs = (jnp.arange(0, I, width), order_I.reshape(-1, width), importance_I.reshape(-1, width))
    carry = (jnp.zeros((I, O), jnp.float32), jnp.zeros(O, jnp.float32))
    (d_IO, loss_O), (codes, hats, fitted) = jax.lax.scan(one_block, carry, xs)
    back_I = jnp.zeros(I, order_I.dtype).at[order_I].set(jnp.arange(I))
    codes_OI, w_hat_OI = (rearrange(rearrange(a, "n w o -> (n w) o")[back_I], "i o -> o i") for a in (codes, hats))
    if refit:
        params = {k: rearrange(a, "n r p -> r (n p)") for k, a in fitted.items()}
    error = jnp.sum(loss_O) - jnp.sum(jnp.square(d_IO) * added_I[order_I][:, None])
    return fmt.pack(codes_OI, fmt.stored(params)), params, w_hat_OI, error


def _params_at(params: Params, column: Any, span: int) -> Params:
    """Those (stored) of the tile at `column` of a span: an array `[R, P]` holds P of them for equal parts of it."""
    return {k: jax.lax.dynamic_slice_in_dim(a, column * a.shape[1] // span, 1, axis=1) for k, a in params.items()}


# -- the solver -------------------------------------------------------------------------------------------------------


def quantize(
    model: Model,
    assignment: Mapping[str, Any],
    documents: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tree:
    """The model's parameters with the sites of `assignment` packed, calibrated on `documents`.

    Of each layer first q, k and v, then o, then gate and up, then down: every Hessian is that of inputs which come
    through what is quantized already. Weights outside of the layers are rounded to nearest. Static activation formats
    get their range from the same text. Options are those of `GptqOptions`. Raises `InputError`.
    """
    params, assignment = attach(model.params, assignment)
    rtn.check_paths(params, assignment)
    solver = _blocks(model.config, assignment, documents, model.tokenizer, GptqOptions(**options))
    readers = readers_of(params)
    known = model.config.shapes()
    blocks = blocks_of({path: readers[path] for path in (*known, *(p for p in readers if p not in known))})
    flat: dict[str, Any] = {}
    for n, block in enumerate(blocks, 1):
        flat |= solver.solve(block)
        if progress is not None:
            progress(n, len(blocks))
    return trees.build(flat)


def quantize_dir(
    src: str | Path,
    plan: Plan | Mapping[str, Any],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    documents: list[str] | None = None,
    **options: Any,
) -> None:
    """`quantize` from a folder into a packed folder with one layer in memory (see `lowbit.ptq.folder`).

    After an interruption the text goes once more through the layers that are done, and the result has the same bits.
    """
    src, opts = Path(src), GptqOptions(**options)
    config = hf.load_config(src)
    assignment = plan.resolve(config.shapes()) if isinstance(plan, Plan) else dict(plan)
    solver = _blocks(config, assignment, documents, hf.load_tokenizer(src), opts)
    text = hashlib.sha256(solver.tokens_BT.tobytes()).hexdigest()
    key = {"solver": "gptq", "options": dataclasses.asdict(opts), "tokens": text}
    quantize_folder(src, Path(out), solver, assignment, key, progress)


def check_format(fmt: Format) -> None:
    """Raises `InputError` for formats whose codes depend on other columns: GPTQ rounds one after the other."""
    if not fmt.idempotent:
        raise InputError(f"format {fmt.name!r} with solver gptq (allowed: those whose columns are rounded apart)")


def _blocks(
    config: ModelConfig, assignment: Mapping[str, Any], documents: Any, tokenizer: Any, options: GptqOptions
) -> "_Blocks":
    if documents is None:
        raise InputError("solver gptq without calibration text (allowed: documents)")
    for fmt in {f for f in assignment.values() if isinstance(f, Format)}:
        check_format(fmt)
    tokens = tokenize(documents, tokenizer, options.rows, length_of(config, options.length), options.seed)
    return _Blocks(config, assignment, tokens, options)


class _Blocks:
    """GPTQ at work on a model, block after block (see `lowbit.ptq.folder.SolveBlock`)."""

    def __init__(self, config: ModelConfig, assignment: Mapping[str, Any], tokens_BT: Any, options: GptqOptions):
        self.config, self.assignment, self.tokens_BT, self.options = config, assignment, tokens_BT, options
        self.stream = Stream(config, tokens_BT, options.batch)
        self.acts = options.inputs == "quantized"

    def solve(self, block: Block) -> Iterator[tuple[str, Any]]:
        if (index := _layer_of(block)) is not None:
            yield from self._layer(index, {path: read() for path, read in block.items()}).items()
            return
        for path, read in block.items():
            leaf = rtn.quantize_leaf(path, read(), self.assignment)
            if path in self.assignment:
                _note(f"{path} is outside of the layers: rounded to nearest")
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
            o = self.options
            order = o.order == "act"
            fmt = wanted[n][0]
            r = gptq(w, hessians[owner], fmt, block=o.block, damping=o.damping, act_order=order, name=path)
            leaves[path] = rtn.with_weight(leaves[path], r.q)
            self._put(layer, n, rtn.with_weight(now, r.w_hat_OI))
            if r.dead:
                _note(f"{path}: {r.dead} of {w.shape[1]} input channels are 0 in all of the text; weights set to 0")
            if r.damping != o.damping:
                _note(f"{path}: its Hessian needed damping {r.damping:g} instead of {o.damping:g}")

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


def _note(text: str) -> None:
    print(f"lowbit: note: {text}", file=sys.stderr)


register(Solver("gptq", quantize, quantize_dir, calibrates=True))

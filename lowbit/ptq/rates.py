"""A format for each tensor under an exact budget of bytes, by what each tensor's error costs the model.

For small errors the divergence from the float model is a sum over tensors (HIGGS' linearity theorem, arXiv 2411.17525;
Q-Palette, NeurIPS 2025, allocates rates by it):

    KL = sum_l a_l e_l        e_l = |W_l - W_hat_l|^2 / |W_l|^2

`a_l` is measured: the KL of the model with normal noise of relative energy `NOISE` in tensor l alone, divided by it.
`e_l` of a format is the error of rounding that very tensor to nearest. What is left is a knapsack
(`lowbit.ptq.allocate`), whose sizes are the bytes that are stored, scales included.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.evaluate.convention import Windows
from lowbit.evaluate.perplexity import token_scores
from lowbit.files import atomic_path
from lowbit.formats import base as formats
from lowbit.formats.base import Format, FormatError
from lowbit.models.model import Model
from lowbit.plan import BLOCK_LINEARS, Plan, Rule, encoded_bytes, total
from lowbit.ptq.allocate import allocate
from lowbit.ptq.calibrate import length_of, tokenize

NOISE = 0.02  # about the error of 3 to 4 bits
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What was chosen. `kl` is the sum of the model above, in nats per token, and `bound` a lower bound of it over all
    assignments within the budget (equal where `exact`); `bytes` are those of the tensors in `formats`."""

    formats: dict[str, str]
    sensitivity: dict[str, float]
    error: dict[str, float]
    bytes: int
    bits: float
    kl: float
    bound: float
    exact: bool

    def plan(self) -> Plan:
        """One rule for every tensor."""
        return Plan(tuple(Rule(re.escape(path), name) for path, name in self.formats.items()))

    def save(self, path: Path, note: str = "") -> None:
        """Writes a rules file (TOML), which `Plan.load` and every `--rules` read."""
        lines = [f"# {line}" for line in note.splitlines()]
        for rule in self.plan().rules:
            lines += ["", "[[rule]]", f"match = '{rule.match}'", f'format = "{rule.format}"']
        with atomic_path(path) as partial_path:
            Path(partial_path).write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")


def sensitivities(
    model: Model,
    paths: Sequence[str],
    documents: Sequence[str],
    *,
    rows: int = 16,
    length: int = 0,
    seed: int = 0,
    noise: float = NOISE,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`a_l` of each tensor in nats per token: KL(model || model with noise in it) / `noise`, on `rows` rows of text.

    Rows are drawn as calibration's are; the noise of a tensor depends on `seed` and its path alone. Raises `InputError`
    for a text that is too short.
    """
    tokens = tokenize(documents, model.tokenizer, rows, length_of(model.config, length), seed)
    w = Windows(tokens, np.ones(tokens.shape, bool), f"gptq-{tokens.shape[1]}")
    out = {}
    for n, path in enumerate(paths, 1):
        leaf = trees.get(model.params, path)
        rng = np.random.default_rng([seed, *path.encode()])
        noisy = _noisy(leaf, jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), np.float32(noise))
        other = model.replace(params=trees.map_leaves(lambda p, a, n=noisy, at=path: n if p == at else a, model.params))
        kl = float(np.mean(token_scores(other, w, model)["kl"], dtype=np.float64))
        if not math.isfinite(kl):
            raise InputError(f"{path}: KL with noise in it is {kl} (allowed: finite)")
        out[path] = max(kl, 0.0) / noise
        if progress is not None:
            progress(n, len(paths))
    return out


def choose(
    model: Model,
    names: Sequence[str],
    documents: Sequence[str],
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    rows: int = 16,
    length: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rates:
    """The formats out of `names` for the linears inside blocks that cost least within a budget.

    `bits`: per weight of these tensors, scales included; `nbytes`: of all stored tensors of the model, those included
    that stay as they are. A format that cannot hold a tensor is no choice for it. Raises `InputError`: unless exactly
    one budget is given, for one below the smallest possible size (which it says), unknown formats, weights that are
    quantized already, and a tensor that no format holds.
    """
    if (bits is None) == (nbytes is None):
        raise InputError("rates with --bits and --bytes" if bits is not None else "rates without --bits or --bytes")
    if not names:
        raise InputError("rates over 0 formats (allowed: at least one)")
    candidates = [formats.get(name) for name in dict.fromkeys(formats.get(n).name for n in names)]
    shapes = model.config.shapes()
    paths = [p for p, s in shapes.items() if len(s) == 2 and re.fullmatch(BLOCK_LINEARS, p)]
    leaves = {p: trees.get(model.params, p) for p in paths}
    if packed := [p for p, a in leaves.items() if not isinstance(a, jax.Array | np.ndarray)]:
        raise InputError(f"{packed[0]} is not a float weight (allowed: a model that nothing has quantized)")
    holds = {p: [f for f in candidates if _holds(f, shapes[p])] for p in paths}
    if bare := [p for p in paths if not holds[p]]:
        raise InputError(
            f"no format of {', '.join(f.name for f in candidates)} holds {bare[0]} {list(shapes[bare[0]])}"
        )
    sizes = [[encoded_bytes(f, shapes[p]) for f in holds[p]] for p in paths]
    weights = sum(math.prod(shapes[p]) for p in paths)
    if bits is not None:
        budget = math.floor(bits * weights / 8)
    else:
        kept = {p: str(a.dtype) for p, a in trees.items(model.params) if hasattr(a, "dtype")}
        rest = {p: s for p, s in shapes.items() if p not in leaves}
        budget = int(nbytes or 0) - total(Plan().table(rest, kept))[0]
    least = sum(map(min, sizes))
    if budget < least:
        asked = f"{bits:g} bits" if bits is not None else f"{nbytes} bytes"
        most = f"{8 * least / weights:.6g} bits" if bits is not None else f"{int(nbytes or 0) - budget + least} bytes"
        raise InputError(f"budget of {asked} (allowed: at least {most}, with the smallest format everywhere)")
    errors = [[relative_error(f, leaves[p]) for f in holds[p]] for p in paths]
    found = sensitivities(model, paths, documents, rows=rows, length=length, seed=seed, progress=progress)
    costs = [[found[p] * e for e in own] for p, own in zip(paths, errors)]
    best = allocate(costs, sizes, budget)
    return Rates(
        {p: holds[p][k].name for p, k in zip(paths, best.choice)},
        found,
        {p: errors[i][k] for i, (p, k) in enumerate(zip(paths, best.choice))},
        best.size,
        8 * best.size / weights,
        best.cost,
        best.bound,
        best.exact,
    )


def predicted(sensitivity: Mapping[str, float], model: Model, assignment: Mapping[str, Format]) -> float:
    """`sum a_l e_l` of any assignment of these tensors."""
    return sum(a * relative_error(assignment[p], trees.get(model.params, p)) for p, a in sensitivity.items())


def relative_error(fmt: Format, w_OI: Float[Array, "O I"]) -> float:
    """`|W - W_hat|^2 / |W|^2` of rounding to nearest; 0 for a matrix of zeros."""
    error, energy = map(float, _errors(fmt, jnp.asarray(w_OI)))
    return error / energy if energy else 0.0


def _holds(fmt: Format, shape: tuple[int, ...]) -> bool:
    try:
        fmt.check(shape)
    except FormatError:
        return False
    return True


@partial(jax.jit, static_argnums=0)
def _errors(fmt: Format, w_OI: Array) -> tuple[Array, Array]:
    w = w_OI.astype(jnp.float32)
    _, w_hat = fmt.round_block(w, fmt.fit_block(w))
    return jnp.sum(jnp.square(w - w_hat)), jnp.sum(jnp.square(w))


@jax.jit
def _noisy(w: Array, noise: Array, energy: Array) -> Array:
    """With noise of this relative energy, exactly, in the dtype that it came in."""
    w32 = w.astype(jnp.float32)
    scale = jnp.sqrt(energy * jnp.sum(jnp.square(w32)) / jnp.sum(jnp.square(noise)))
    return (w32 + noise * scale).astype(w.dtype)

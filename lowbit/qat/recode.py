"""Codes that change where the loss of the whole model falls for it: the V step of PV-Tuning (arXiv 2405.14852).

The paper re-encodes the tiles of the largest gradient at `w - lr g`. But code words lie far apart: a step from one to
another is no small step, and most of them make the loss worse. Here a change `D` of a weight is judged by what it does,

    <G, D> + 1/2 tr(H_O D H_I D^T)

with the gradient G of the loss and a Kronecker estimate of its curvature (sketch B of YAQA, arXiv 2505.22988: the
Fisher matrix, from gradients at labels that the model draws itself). Every tile is encoded anew, by the format's own
search, at a few lengths of its Newton step; the best is its candidate. Candidates change in the order of what they
gain, each judged with all that changed before it in the same weight. How many do is decided by the loss on other rows:
the quadratic knows neither other weights nor how far it holds.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from lowbit import tree as trees
from lowbit.formats.base import Coded, Format, Params
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.ptq import rtn
from lowbit.ptq.modelwise import weight
from lowbit.train.loop import Moment, Record
from lowbit.train.objective import Objective, split
from lowbit.tree import Tree

HIGHEST = jax.lax.Precision.HIGHEST
LENGTHS = (0.5, 1.0, 2.0)  # of the Newton step, at which tiles are encoded
TRUST = 4.0  # times the curvature: weights that change together add up to more than each by itself
DAMPING = 0.02  # of the factors' mean diagonal, added to it
CURVATURE_ROWS = 32  # of text at most; a curvature need not be known as well as a slope
SHARES = (0.003, 0.03, 0.1, 0.3, 1.0)  # of the changes allowed, tried in this order


class Slope(NamedTuple):
    """What is known of the loss as a function of one weight; the curvature is `H_OO` x `H_II`."""

    G_OI: Float[Array, "O I"]
    H_II: Float[Array, "I I"]
    H_OO: Float[Array, "O O"]


class Changes(NamedTuple):
    """Candidates of a weight: its codes if all tiles changed; which tiles gain, best first, and whether each still does
    after those before it."""

    codes: Int[Array, "Oc Ic"]
    tiles_K: Int[Array, " K"]
    wanted_K: Bool[Array, " K"]


def revise(config: ModelConfig, params: Tree, now: Moment) -> tuple[Tree, Record]:
    """`params` with codes of its `Coded`s changed, and `codes_changed` (tiles), `loss_before` and `loss_after`.

    The gradient is that of `now.settings.revise_rows` rows (of half the run's at most), the loss that of as many
    others; `revise_fraction` of a weight's tiles change at most, none where no change lowers the loss. Memory: two
    float32 copies of the weights and the factors, `O^2 + I^2` numbers each.
    """
    settings = now.settings
    flat = dict(trees.items(params))
    paths = [p for p, leaf in flat.items() if isinstance(weight(leaf), Coded)]
    coded = {p: weight(flat[p]) for p in paths}
    count = min(-(-settings.revise_rows // settings.batch_size), max(1, settings.steps // 2))
    first, second = [now.batch(i) for i in range(count)], [now.batch(count + i) for i in range(count)]
    slopes = measure(config, now.objective, flat, coded, now.teacher, first, now.step)
    found = {p: candidates(c, slopes.pop(p), settings.revise_fraction) for p, c in coded.items()}

    def loss(tree: Tree) -> float:
        sums = [_loss(now.objective, tree, now.teacher, rows) for rows in second]
        return float(sum(s for s, _ in sums)) / max(float(sum(n for _, n in sums)), 1.0)

    start = loss(params)
    best, changed, lowest = params, 0, start
    for share in SHARES:
        new = {p: _taken(c, found[p], jnp.float32(share)) for p, c in coded.items()}
        leaves = {p: rtn.with_weight(flat[p], coded[p].with_codes(codes)) for p, (codes, _) in new.items()}
        tree = trees.build({**flat, **leaves})
        if (after := loss(tree)) < lowest:
            best, changed, lowest = tree, sum(int(n) for _, n in new.values()), after
    return best, {"codes_changed": changed, "loss_before": start, "loss_after": lowest}


def measure(
    config: ModelConfig,
    objective: Objective,
    flat: dict[str, Any],
    coded: dict[str, Coded],
    teacher: Tree | None,
    batches: list[dict[str, Array]],
    seed: int,
) -> dict[str, Slope]:
    """Of each of these weights, in the space of its format (see `Format.inside`): the gradient of the mean loss, and
    the curvature's factors of a mean over tokens: `H_OO` with its trace, `H_II` with trace 1."""
    weights = {p: c.value().astype(jnp.float32) for p, c in coded.items()}
    stored = {p: c.codes()[1] for p, c in coded.items()}
    formats = tuple(c.format for c in coded.values())
    sums = {p: Slope(jnp.zeros((o, i)), jnp.zeros((i, i)), jnp.zeros((o, o))) for p, (o, i) in _shapes(weights).items()}
    tokens, rows = jnp.zeros(()), 0
    for n, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), n)
        if n == 0 or rows < CURVATURE_ROWS:
            sums = _add_curvature(config, formats, weights, stored, flat, batch, key, sums)
            rows += len(batch["tokens"])
        sums, tokens = _add_slope(objective, formats, weights, stored, flat, teacher, batch, sums, tokens)
    out = {}
    for p, s in sums.items():
        size = jnp.maximum(jnp.trace(s.H_II), 1e-30)
        H_II, H_OO = _damped(s.H_II / size), _damped(s.H_OO / rows)
        out[p] = Slope(s.G_OI / jnp.maximum(tokens, 1.0), H_II, H_OO)
    return out


def _shapes(weights: dict[str, Array]) -> dict[str, tuple[int, int]]:
    return {p: (w.shape[0], w.shape[1]) for p, w in weights.items()}


def _damped(H: Float[Array, "n n"]) -> Float[Array, "n n"]:
    mean = jnp.maximum(jnp.mean(jnp.diagonal(H)), 1e-30)
    return H + DAMPING * mean * jnp.eye(len(H))


def _with_weights(rest: dict[str, Any], weights: dict[str, Array]) -> Tree:
    return trees.build({**rest, **{p: rtn.with_weight(rest[p], w) for p, w in weights.items()}})


def _inside(formats: tuple[Format, ...], stored: dict[str, Params], grads: dict[str, Array]) -> dict[str, Array]:
    return {p: f.gradient_inside(grads[p], stored[p]) for p, f in zip(stored, formats)}


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def _add_slope(
    objective: Objective,
    formats: tuple[Format, ...],
    weights: dict[str, Array],
    stored: dict[str, Params],
    rest: dict[str, Any],
    teacher: Tree | None,
    batch: dict[str, Array],
    sums: dict[str, Slope],
    tokens: Array,
) -> tuple[dict[str, Slope], Array]:
    """`sums` plus the gradient of the batch's summed loss; `tokens` plus those of the batch."""
    total = jax.value_and_grad(lambda w: objective(_with_weights(rest, w), teacher, batch), has_aux=True)
    (_, n), grads = total(weights)
    grads = _inside(formats, stored, grads)
    return {p: s._replace(G_OI=s.G_OI + grads[p]) for p, s in sums.items()}, tokens + n


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def _add_curvature(
    config: ModelConfig,
    formats: tuple[Format, ...],
    weights: dict[str, Array],
    stored: dict[str, Params],
    rest: dict[str, Any],
    batch: dict[str, Array],
    key: Array,
    sums: dict[str, Slope],
) -> dict[str, Slope]:
    """`sums` plus each sequence's `G^T G` and `G G^T`, at labels that the model draws."""

    def drawn(weights: dict[str, Array], row: dict[str, Array], key: Array) -> Array:
        inputs, _, segments, _ = split({k: a[None] for k, a in row.items()})
        logits_TV = forward(_with_weights(rest, weights), inputs, config, segments_BT=segments)[0].astype(jnp.float32)
        labels_T = jax.random.categorical(key, jax.lax.stop_gradient(logits_TV))
        logp_TV = jax.nn.log_softmax(logits_TV)
        # Of independent draws: the expected outer product of the sum over the root is the mean token's.
        return -jnp.sum(jnp.take_along_axis(logp_TV, labels_T[:, None], axis=1)) / np.float32(np.sqrt(len(labels_T)))

    def one(sums: dict[str, Slope], xs: tuple[dict[str, Array], Array]) -> tuple[dict[str, Slope], None]:
        grads = _inside(formats, stored, jax.grad(drawn)(weights, *xs))
        H_II = {p: s.H_II + jnp.dot(grads[p].T, grads[p], precision=HIGHEST) for p, s in sums.items()}
        H_OO = {p: s.H_OO + jnp.dot(grads[p], grads[p].T, precision=HIGHEST) for p, s in sums.items()}
        return {p: Slope(s.G_OI, H_II[p], H_OO[p]) for p, s in sums.items()}, None

    rows = {k: batch[k] for k in ("tokens", "segments") if k in batch}
    return jax.lax.scan(one, sums, (rows, jax.random.split(key, len(batch["tokens"]))))[0]


@partial(jax.jit, static_argnums=0)
def _loss(objective: Objective, params: Tree, teacher: Tree | None, batch: dict[str, Array]) -> tuple[Array, Array]:
    return objective(params, teacher, batch)


def candidates(coded: Coded, slope: Slope, fraction: float) -> Changes:
    """The `fraction` of a weight's tiles (one at least) that gain most by other codes."""
    codes, stored = coded.codes()
    return _candidates(*coded.format.inside(stored), fraction, codes, slope)


@partial(jax.jit, static_argnums=(0, 2))
def _candidates(fmt: Format, stored: Params, fraction: float, codes: Int[Array, "Oc Ic"], slope: Slope) -> Changes:
    G_OI, H_II, H_OO = slope
    s, t = fmt.tile
    w_OI = fmt.dequantize(codes, stored)
    P, Q = w_OI.shape[0] // s, w_OI.shape[1] // t

    def tiles(x: Array) -> Array:
        return rearrange(x, "(p o) (q i) -> p q o i", p=P, q=Q)

    g, now = tiles(G_OI), tiles(codes)
    out_Pss = H_OO.reshape(P, s, P, s)[jnp.arange(P), :, jnp.arange(P)]
    in_Qtt = H_II.reshape(Q, t, Q, t)[jnp.arange(Q), :, jnp.arange(Q)] * TRUST
    step = jnp.einsum("pab,pqbc,qcd->pqad", jnp.linalg.inv(out_Pss), g, jnp.linalg.inv(in_Qtt), precision=HIGHEST)
    step_OI = rearrange(step, "p q o i -> (p o) (q i)")
    best = jnp.zeros((P, Q)), now, jnp.zeros_like(g)
    for length in LENGTHS:
        new = fmt.quantize(w_OI - np.float32(length) * step_OI, stored)
        d = tiles(fmt.dequantize(new, stored) - w_OI)
        curved = jnp.einsum("pab,pqbc,qcd->pqad", out_Pss, d, in_Qtt, precision=HIGHEST)
        gain = jnp.sum(g * d + 0.5 * curved * d, axis=(2, 3))
        better = (gain < best[0]) & (tiles(new) != now).any(axis=(2, 3))
        best = tuple(jnp.where(_like(better, a), a, b) for a, b in zip((gain, tiles(new), d), best))
    gain, new, d = best
    count = max(1, round(fraction * P * Q))
    lowest, order = jax.lax.top_k(-gain.reshape(-1), count)
    at_K, of_K = order // Q, order % Q
    d_Kst = d.reshape(P * Q, s, t)[order]
    H_PsPs, H_QtQt = H_OO.reshape(P, s, P, s), H_II.reshape(Q, t, Q, t) * TRUST

    def one(n: Array, taken_Kst: Array) -> Array:
        """Takes candidate n if it still gains at the slope that those before it leave."""
        p, q, mine = at_K[n], of_K[n], d_Kst[n]
        others = jnp.einsum("akb,kbc,kcd->ad", H_PsPs[p][:, at_K], taken_Kst, H_QtQt[:, :, q][of_K], precision=HIGHEST)
        curved = jnp.dot(jnp.dot(out_Pss[p], mine, precision=HIGHEST), in_Qtt[q], precision=HIGHEST)
        gains = (lowest[n] > 0) & (jnp.sum((g[p, q] + others) * mine + 0.5 * curved * mine) < 0)
        return taken_Kst.at[n].set(jnp.where(gains, mine, 0.0))

    taken_Kst = jax.lax.fori_loop(0, count, one, jnp.zeros_like(d_Kst))
    wanted_K = jnp.any(taken_Kst != 0, axis=(1, 2))
    return Changes(rearrange(new, "p q o i -> (p o) (q i)"), order, wanted_K)


def _like(mask_PQ: Array, a: Array) -> Array:
    return mask_PQ.reshape(*mask_PQ.shape, *[1] * (a.ndim - 2))


@jax.jit
def _taken(coded: Coded, found: Changes, share: Array) -> tuple[Int[Array, "Oc Ic"], Int[Array, ""]]:
    """The codes of `coded` after the first `share` of the changes, and the number of tiles that change."""
    codes, _ = coded.codes()
    s, t = coded.format.tile
    P, Q = coded.shape[0] // s, coded.shape[1] // t
    K = len(found.tiles_K)
    takes_K = found.wanted_K & (jnp.arange(K) < jnp.maximum(1.0, jnp.round(share * K)))
    takes_PQ = jnp.zeros(P * Q, bool).at[found.tiles_K].set(takes_K).reshape(P, Q)
    spread = jnp.repeat(jnp.repeat(takes_PQ, codes.shape[0] // P, axis=0), codes.shape[1] // Q, axis=1)
    return jnp.where(spread, found.codes, codes), jnp.sum(takes_K)

"""PARQ and BinaryRelax: the map, its ends, and what an optimizer makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.models import decoder
from lowbit.plan import Plan
from lowbit.qat.proximal import Anneal, ProxState, prox, value
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

U = np.random.default_rng(0).standard_t(4, (6, 32)).astype(np.float32)
UP = "model.layers.1.mlp.up_proj"


def levels_of(fmt, stored) -> np.ndarray:
    low, high = fmt.levels
    step = 2 if getattr(fmt, "odd", False) else 1
    zero = np.asarray(stored["zero"], np.float64)[..., None] if "zero" in stored else 0.0
    return (np.arange(low, high + 1, step) - zero) * np.asarray(stored["scale"], np.float64)[..., None]


@pytest.mark.parametrize(
    "name", ["int2:g16", "int3:channel:asym", "ternary:tensor", "int1:channel", "int2:g16:midrise"]
)
def test_the_map_is_the_published_one(name: str):
    """Between neighbours `clip(c + (u - c) / r, lower, upper)`; the identity at 1, the quantizer at 0."""
    fmt = base.get(name)
    own = fmt.fitted(jnp.asarray(U))
    at = jax.jit(lambda u, r: value(fmt, u, own, r))
    np.testing.assert_array_equal(at(U, 1.0), U)
    np.testing.assert_array_equal(at(U, 0.0), fmt.fake_quant(jnp.asarray(U), own))
    r, got = 0.3, np.asarray(at(U, 0.3))
    q = levels_of(fmt, jax.jit(fmt.stored)(own))
    q = np.broadcast_to(q, (6, *q.shape[1:]))
    q = np.repeat(q, 32 // q.shape[1], axis=1)
    for (i, j), u in np.ndenumerate(U.astype(np.float64)):
        ladder = q[i, j]
        k = np.clip(np.searchsorted(ladder, u, side="right") - 1, 0, len(ladder) - 2)
        lower, upper = ladder[k], ladder[k + 1]
        if u < ladder[0] or u > ladder[-1]:
            end = ladder[0] if u < ladder[0] else ladder[-1]
            want = end + r * (u - end)
        else:
            centre = (lower + upper) / 2
            want = np.clip(centre + (u - centre) / r, lower, upper)
        np.testing.assert_allclose(got[i, j], want, rtol=1e-4, atol=1e-5)


def test_inverse_slope_falls_from_one_to_zero():
    r = np.asarray(jax.jit(lambda t: Anneal(0.2, 0.8).inverse_slope(t, 100))(np.arange(101)))
    assert (r[:21] == 1).all() and (r[80:] == 0).all() and (np.diff(r[20:81]) < 0).all()
    np.testing.assert_allclose(r[50], 0.5, atol=1e-3)  # the middle of a mirrored sigmoid


def test_it_is_an_optax_transform_of_any_dict():
    """A quadratic whose minimum lies between the levels: the latent goes there, what is shown ends on the grid."""
    fmt, goal = base.get("int2:channel:f32"), jnp.asarray(U)
    w = {"a": jnp.zeros_like(goal) + 0.1, "b": jnp.ones(3)}
    tx = prox(optax.sgd(0.1), {"a": fmt}, steps=50, kind="parq")
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        grads = jax.grad(lambda w: 0.5 * jnp.square(w["a"] - goal).sum() + jnp.square(w["b"]).sum())(w)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    for _ in range(50):
        w, state = step(w, state)
    assert isinstance(state, ProxState) and float(jnp.abs(w["b"]).max()) < 1e-3
    on_grid = fmt.fake_quant(state.latent["a"], fmt.fitted(state.latent["a"]))
    np.testing.assert_array_equal(state.shown["a"], on_grid)
    np.testing.assert_allclose(w["a"], on_grid, rtol=1e-5, atol=1e-6)
    assert float(jnp.square(w["a"] - goal).mean()) < float(jnp.square(goal).mean())


@pytest.mark.parametrize(
    "recipe, fmt", [("parq:end0.5", "int2:g16"), pytest.param("binary-relax:end0.5", "q4_1", marks=pytest.mark.slow)]
)
def test_training_ends_on_the_grid_and_packs_to_the_same_logits(recipe: str, fmt: str):
    # q4_1 has blocks of 32, which down_proj's 48 columns are not.
    plan = {p: f for p, f in Plan.uniform("int4:g16").resolve(CONFIG.shapes()).items() if not p.endswith("down_proj")}
    plan = {p: base.get(fmt) for p in plan}
    r = qat.get(recipe)
    start = r.prepare(params(1), plan)
    settings = TrainConfig(steps=4, batch_size=4, lr=1e-2, schedule="constant", log_every=1)
    done = train(start, rows(), language(CONFIG, settings), settings, wrap=r.wrap).params
    tokens, logits = jnp.asarray(rows()(0)["tokens"]), jax.jit(decoder.forward, static_argnames="config")
    np.testing.assert_array_equal(logits(start, tokens, CONFIG), logits(params(1), tokens, CONFIG))  # soft: as it is
    np.testing.assert_array_equal(logits(done, tokens, CONFIG), logits(r.convert(done), tokens, CONFIG))
    before, after = (np.asarray(dict(trees.items(t))[UP].w) for t in (start, done))
    assert np.mean(before != after) > 0.5


def test_refusals():
    plan = Plan.uniform("bf16").resolve(CONFIG.shapes()) | {UP: base.get("q4_1")}
    with pytest.raises(InputError, match="up_proj: format 'q4_1' with recipe parq .*binary-relax"):
        qat.get("parq").prepare(params(), plan)
    for name in ("parq:start0.9:end0.1", "parq:steep0", "parq:end2"):
        with pytest.raises(InputError, match="0 <= start < end <= 1"):
            qat.get(name)
    settings = TrainConfig(steps=1, freeze_above=0.1)
    with pytest.raises(InputError, match="freeze_above with a recipe that keeps its own latents"):
        train(params(), rows(), language(CONFIG, settings), settings, wrap=qat.get("parq").wrap)
    with pytest.raises(InputError, match="recipe parq: key 'slow'"):
        qat.get("parq:slow")
    with pytest.raises(InputError, match="recipe ste with key 'x' .allowed: none"):
        qat.get("ste:x")

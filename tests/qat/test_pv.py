"""PV-Tuning: codes that change where the loss falls for it, and what is continuous around them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.base import Coded
from lowbit.plan import Plan
from lowbit.qat import recode
from lowbit.qat.recode import Slope
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

FORMATS = ["int2:g16", "int2:g16:asym", "q2_k", "ternary:channel", "rht:f16:e8p2", "trellis2:mcg:l8"]
FORMATS += [pytest.param(n, marks=pytest.mark.slow) for n in ("e8p3", "rht:rows:trellis2:hyb:l8", "aqlm:2x4:g4")]
FORMATS += [pytest.param("vptq:v4:k16", marks=pytest.mark.slow)]


def coded(name: str, seed: int = 0) -> Coded:
    w = np.random.default_rng(seed).standard_normal((32, 256)).astype(np.float32)
    return Coded.of(base.get(name).encode(jnp.asarray(w)), every=True)


def slope(c: Coded, target, strength: float = 1.0) -> Slope:
    """That of `tr(H_O D H_I D^T) / 2` around another weight."""
    rng = np.random.default_rng(5)
    O, I = c.shape
    a, b = rng.standard_normal((O, 3 * O)), rng.standard_normal((I, 3 * I))
    H_OO, H_II = a @ a.T / (3 * O) * strength, b @ b.T / (3 * I)
    fmt, stored = c.format.inside(c.codes()[1])
    now = np.asarray(fmt.dequantize(c.codes()[0], stored), np.float64)
    return Slope(*(jnp.asarray(x, jnp.float32) for x in (H_OO @ (now - target) @ H_II, H_II, H_OO)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quadratic_falls_by_every_share_of_the_changes_and_nothing_else_moves(name):
    c = coded(name)
    fmt, stored = c.format.inside(c.codes()[1])
    now = np.asarray(fmt.dequantize(c.codes()[0], stored), np.float64)
    target = now + now.std() * np.random.default_rng(1).standard_normal(now.shape)
    s = slope(c, target)
    found = recode.candidates(c, s, 0.25)
    before, tiles = np.asarray(c.codes()[0]), now.size // (fmt.tile[0] * fmt.tile[1])

    def value(w):
        d = np.asarray(w, np.float64) - target
        return float(np.sum((np.asarray(s.H_OO, np.float64) @ d @ np.asarray(s.H_II, np.float64)) * d)) / 2

    last, most = value(now), 0
    for share in (0.1, 1.0):
        codes, count = recode._taken(c, found, jnp.float32(share))
        new = c.with_codes(codes)
        assert all(np.array_equal(new.params[k], a) for k, a in c.params.items())
        np.testing.assert_array_equal(new.codes()[0], codes)
        there = value(fmt.dequantize(codes, stored))
        assert 0 < int(count) <= max(1, round(0.25 * tiles))
        assert there < last if int(count) > most else there == last and int(count) == most
        last, most = there, int(count)
        P, Q = now.shape[0] // fmt.tile[0], now.shape[1] // fmt.tile[1]
        moved = (np.asarray(codes) != before).reshape(P, before.shape[0] // P, Q, -1).any(axis=(1, 3))
        assert moved.sum() == int(count)


def test_what_changed_before_counts():
    """Two weights of one row that see the same input: each alone would take the whole way, so one of them does."""
    c = Coded.of(base.get("int2:g16").encode(jnp.linspace(-1.5, 1.5, 16)[None].repeat(1, axis=0)), every=True)
    codes, stored = c.codes()
    w = np.asarray(c.format.dequantize(codes, stored))
    low = np.flatnonzero(w[0] == w[0].min())[:2]
    step = np.unique(w[0])[1] - np.unique(w[0])[0]
    H_II = np.eye(16, dtype=np.float32) * 1e-3
    H_II[np.ix_(low, low)] = 1.0
    G = np.zeros((1, 16), np.float32)
    G[0, low] = -step * recode.TRUST
    found = recode.candidates(c, Slope(jnp.asarray(G), jnp.asarray(H_II), jnp.ones((1, 1))), 1.0)
    assert set(np.asarray(found.tiles_K)[:2]) == set(low)
    assert np.asarray(found.wanted_K).sum() == 1


@pytest.mark.parametrize("name", ["int2:g16", "rht:rows:e8p2"])
def test_the_slope_is_the_gradient_in_the_space_of_the_codes(name):
    """Against the loss itself, moved a little along one tile; the curvature's factors as `Slope` has them."""
    start = qat.get("e2e-pv").prepare(params(), Plan.uniform(name).resolve(CONFIG.shapes()))
    flat = dict(trees.items(start))
    path = "model.layers.0.self_attn.q_proj"
    c = flat[path]
    objective = language(CONFIG, TrainConfig(loss="kl"), CONFIG)
    batch = {k: jnp.asarray(v) for k, v in rows()(0).items()}
    found = recode.measure(CONFIG, objective, flat, {path: c}, params(), [batch, batch], 0)[path]
    fmt, stored = c.format.inside(c.codes()[1])
    w = fmt.dequantize(c.codes()[0], stored)
    d = jnp.zeros_like(w).at[2, 8:16].set(1e-2 * jnp.arange(1.0, 9.0))

    @jax.jit
    def loss(w):
        whole = c.format.leave(w, c.codes()[1]) if fmt is not c.format else w
        total, n = objective(trees.build({**flat, path: whole}), params(), batch)
        return total / n

    np.testing.assert_allclose((loss(w + d) - loss(w - d)) / 2, jnp.sum(found.G_OI * d), rtol=2e-2)
    assert found.H_II.shape == (c.shape[1],) * 2 and found.H_OO.shape == (c.shape[0],) * 2
    np.testing.assert_allclose(jnp.trace(found.H_II), 1 + recode.DAMPING, rtol=1e-4)
    assert np.linalg.eigvalsh(np.asarray(found.H_OO, np.float64)).min() > 0


def settings(recipe, **more) -> TrainConfig:
    own = {"revise_every": 2, "revise_fraction": 0.02, "revise_rows": 8, "lr": 1e-3}
    own |= {"steps": 7, "batch_size": 4, "loss": "kl", "schedule": "constant"}
    return TrainConfig(**recipe.defaults | own | more)


@pytest.mark.slow
def test_training_changes_few_codes_and_resumes_to_the_same_bits(tmp_path):
    recipe = qat.get("e2e-pv")
    assignment = Plan.uniform("int2:g16").resolve(CONFIG.shapes())
    start = recipe.prepare(params(), assignment)
    config = settings(recipe)
    objective = language(CONFIG, config, CONFIG)
    told = []
    same = {"teacher": params(), "revise": partial(recipe.revise, CONFIG)}
    whole = train(start, rows(), objective, config, on_metrics=told.append, **same)

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    first = dataclasses.replace(config, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(start, rows(), objective, first, directory=tmp_path, on_metrics=stop, **same)
    parts = train(start, rows(), objective, first, directory=tmp_path, resume=True, **same)
    a, b = (dict(trees.items(recipe.convert(r.params))) for r in (whole, parts))
    changed = total = 0
    for path in assignment:
        for k in a[path].arrays:
            assert np.asarray(a[path].arrays[k]).tobytes() == np.asarray(b[path].arrays[k]).tobytes(), path
        old, new = dict(trees.items(start))[path].codes()[0], a[path].codes()[0]
        changed, total = changed + int((old != new).sum()), total + old.size
    revised = {m["step"]: m for m in told if "codes_changed" in m}
    assert set(revised) == {2, 4, 6}
    assert all(m["loss_after"] <= m["loss_before"] for m in revised.values())
    assert 0 < changed <= sum(m["codes_changed"] for m in revised.values()) <= 3 * 0.021 * total


def test_no_change_that_does_not_help(monkeypatch):
    """Where the other rows' loss rises by whatever changes, nothing does."""
    recipe = qat.get("e2e-pv")
    config = settings(recipe, steps=3)
    start = recipe.prepare(params(), Plan.uniform("int2:g16").resolve(CONFIG.shapes()))
    objective = language(CONFIG, config, CONFIG)
    real = recode.measure

    def uphill(*args):
        return {p: s._replace(G_OI=-s.G_OI) for p, s in real(*args).items()}

    monkeypatch.setattr(recode, "measure", uphill)
    told = []
    whole = partial(recipe.revise, CONFIG)
    done = train(start, rows(), objective, config, teacher=params(), revise=whole, on_metrics=told.append)
    assert [m["codes_changed"] for m in told if "codes_changed" in m] == [0]
    for path, leaf in trees.items(done.params):
        if isinstance(leaf, Coded):
            np.testing.assert_array_equal(leaf.codes()[0], dict(trees.items(start))[path].codes()[0])


def test_refusals():
    with pytest.raises(InputError, match="q_proj: format 'mxfp4' has no scales to train"):
        qat.get("pv").prepare(params(), {"model.layers.0.self_attn.q_proj": base.get("mxfp4")})
    with pytest.raises(InputError, match="revise_every is 0"):
        TrainConfig(revise_every=0)
    with pytest.raises(InputError, match="revise_rows is 0"):
        TrainConfig(revise_rows=0)
    recipe = qat.get("e2e-pv")
    start = recipe.prepare(params(), Plan.uniform("int2:g16").resolve(CONFIG.shapes()))
    config = settings(recipe, revise_every=7)
    with pytest.raises(InputError, match="revise_every is 7 with 7 steps"):
        train(start, rows(), language(CONFIG, config, CONFIG), config, revise=partial(recipe.revise, CONFIG))

"""PV-Tuning: codes that move, few at a time, and what is continuous around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.base import SHIFT, Coded
from lowbit.plan import Plan
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

FORMATS = ["int2:g16", "int2:g16:asym", "q2_k", "ternary:channel"]


def rms(w):
    """Of each row."""
    return np.sqrt(np.square(np.asarray(w)).mean(axis=1, keepdims=True))


def coded(name: str, seed: int = 0) -> Coded:
    w = np.random.default_rng(seed).standard_normal((8, 256)).astype(np.float32)
    return Coded.of(base.get(name).encode(jnp.asarray(w)), every=True).with_shift()


@pytest.mark.parametrize("name", FORMATS)
def test_the_shift_is_not_seen_and_has_the_gradient_of_the_weights(name):
    c = coded(name)
    g = np.random.default_rng(1).standard_normal(c.shape).astype(np.float32)
    moved = dataclasses.replace(c, params={**c.params, SHIFT: jnp.full(c.shape, 0.3)})

    @jax.jit
    def both(c, g):
        value, pull = jax.vjp(lambda p: dataclasses.replace(c, params=p).value(), c.params)
        return value, pull(g)[0]

    value, grads = both(moved, g)
    assert np.asarray(value).tobytes() == np.asarray(c.encode().decode()).tobytes()
    np.testing.assert_array_equal(grads[SHIFT], g)
    assert set(grads) == set(moved.params) and all(np.abs(a).max() > 0 for a in grads.values())
    assert all(np.array_equal(a, moved.encode().arrays[k]) for k, a in c.encode().arrays.items())
    moved.check_values()


@pytest.mark.parametrize("name", FORMATS)
def test_a_revision_moves_the_largest_that_change_and_no_more(name):
    """The nearest codes at the target in the chosen tiles, the old ones elsewhere; what they miss stays as shift."""
    c = coded(name)
    shift = np.random.default_rng(2).standard_normal(c.shape).astype(np.float32)
    shift[0, :4] = 9.0
    unit = rms(c.value())
    moved = dataclasses.replace(c, params={**c.params, SHIFT: jnp.asarray(shift / unit)})
    new = moved.revised(0.1)
    (before, stored), (after, again) = c.codes(), new.codes()
    assert all(np.array_equal(stored[k], again[k]) for k in stored)
    chosen = np.asarray(after) != np.asarray(before)
    target = np.asarray(c.format.quantize(c.value() + shift, stored))
    wanted = target != np.asarray(before)
    assert chosen.sum() == round(0.1 * chosen.size)
    assert np.abs(shift[chosen]).min() >= 0.999 * np.abs(shift[wanted & ~chosen]).max()
    assert np.mean(np.asarray(after)[chosen] == target[chosen]) > 0.99  # ties of the last bit
    there = np.asarray(c.value()) + shift
    np.testing.assert_allclose(np.asarray(new.value()) + np.asarray(new.params[SHIFT]) * unit, there, atol=2e-4)
    np.testing.assert_allclose((np.asarray(new.params[SHIFT]) * unit)[~chosen], shift[~chosen], rtol=1e-5)
    same = c.revised(1.0)  # nothing wants to move
    assert all(np.array_equal(a, same.arrays[k]) for k, a in c.arrays.items())


@pytest.mark.parametrize(
    "name",
    ["rht:f16:e8p2", "trellis2:mcg:l8"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("e8p2", "rht:trellis2:hyb:l8", "aqlm:2x4:g4", "vptq:v4:k16")],
)
def test_codes_of_vectors_move_where_they_should(name):
    """The forward pass at what moved is nearer to the target by what the tiles were off; all else is as it was."""
    w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    c = Coded.of(base.get(name).encode(jnp.asarray(w)), every=True).with_shift()
    shift = jnp.asarray(np.random.default_rng(3).standard_normal(c.shape).astype(np.float32))
    moved = dataclasses.replace(c, params={**c.params, SHIFT: shift})
    new = jax.jit(lambda c: c.revised(0.25))(moved)
    assert all(np.array_equal(a, new.params[k]) for k, a in c.params.items() if k != SHIFT)
    before, after, left = (np.asarray(a) for a in (c.value(), new.value(), new.params[SHIFT]))
    shift, left = shift * rms(before), left * rms(before)
    np.testing.assert_allclose(after + left, before + shift, atol=1e-4)  # nothing that was wanted is lost
    assert np.square(left).sum() < 0.95 * np.square(shift).sum()
    codes = [np.asarray(x.codes()[0]) for x in (c, new)]
    assert 0 < (codes[0] != codes[1]).mean() <= 0.26
    again = c.revised(1.0)
    assert all(np.array_equal(a, again.arrays[k]) for k, a in c.arrays.items())


def test_a_trellis_searches_more_tiles_than_may_change():
    """So that tiles whose path stays do not keep the others from changing."""
    fmt = base.get("trellis2:mcg:l8")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64)), jnp.float32)
    codes, stored = fmt.encode(w[0]).codes()
    norms = jnp.asarray(np.random.default_rng(1).permutation(16).reshape(4, 4) + 1, jnp.float32)
    new, whole = (np.asarray(f) for f in (fmt.nearest(codes, stored, w[1], norms, 2), fmt.quantize(w[1], stored)))
    moved = (new != np.asarray(codes)).reshape(4, 1, 4, 256).any((1, 3))
    np.testing.assert_array_equal(moved, norms > 8)
    tile = moved.repeat(256, axis=1)
    assert np.mean(new[tile] == whole[tile]) > 0.9  # tail-biting passes may end on another path


def test_training_changes_few_codes_and_resumes_to_the_same_bits(tmp_path):
    recipe = qat.get("pv")
    assignment = Plan.uniform("int2:g16").resolve(CONFIG.shapes())
    start = recipe.prepare(params(), assignment)
    settings = TrainConfig(
        **recipe.defaults
        | {"revise_every": 2, "revise_fraction": 0.02, "lr": 1e-2}
        | {"steps": 6, "batch_size": 4, "loss": "kl", "schedule": "constant"}
    )
    objective = language(CONFIG, settings, CONFIG)
    same = {"teacher": params(), "revise": recipe.revise}
    whole = train(start, rows(), objective, settings, **same)
    train(start, rows(), objective, dataclasses.replace(settings, steps=3), directory=tmp_path, **same)
    parts = train(start, rows(), objective, settings, directory=tmp_path, resume=True, **same)
    a, b = (dict(trees.items(recipe.convert(r.params))) for r in (whole, parts))
    changed = total = 0
    for path in assignment:
        for k in a[path].arrays:
            assert np.asarray(a[path].arrays[k]).tobytes() == np.asarray(b[path].arrays[k]).tobytes(), path
        old, new = dict(trees.items(start))[path].codes()[0], a[path].codes()[0]
        changed, total = changed + int((old != new).sum()), total + old.size
    assert 0 < changed <= 3 * 0.021 * total


def test_refusals():
    with pytest.raises(InputError, match="q_proj: format 'mxfp4' has no scales to train"):
        qat.get("pv").prepare(params(), {"model.layers.0.self_attn.q_proj": base.get("mxfp4")})
    with pytest.raises(InputError, match="revise_every is 0"):
        TrainConfig(revise_every=0)

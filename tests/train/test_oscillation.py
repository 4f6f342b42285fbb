"""Codes that flip, swing and are frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.formats import base
from lowbit.plan import Plan
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.train.oscillation import shares, track

FMT = base.get("int4:channel:f32")
# Codes of a weight under the fixed scale 1: rne(w).
W = {"a": jnp.asarray([[0.4, 2.0, -3.0, 0.0]]), "a:scale": jnp.ones((1, 1))}


def run(steps: list[list[float]], momentum: float, threshold: float):
    """Adds the given updates one after the other; the parameters and shares after each."""
    tx = track(optax.scale(1.0), {"a": FMT}, momentum, threshold)
    state, w, seen = tx.init(W), W, []

    @jax.jit
    def step(update, state, w):
        updates, state = tx.update({"a": update, "a:scale": jnp.zeros((1, 1))}, state, w)
        return optax.apply_updates(w, updates), state, shares(state)

    for update in steps:
        w, state, s = step(jnp.asarray([update]), state, w)
        seen.append((np.asarray(w["a"])[0], {k: float(v) for k, v in s.items()}, state))
    return seen


def test_flips_and_oscillations_are_counted():
    swing = [0.2, 1.0, 0.0, 0.0], [-0.2, 1.0, 0.0, 0.0], [0.2, 1.0, 0.0, 0.0]
    seen = run(list(swing), 0.9, 0.0)
    # The first weight changes 0 -> 1 -> 0 -> 1, the second rises and never turns.
    assert [s["flip_rate"] for _, s, _ in seen] == [0.5, 0.5, 0.5]
    assert [s["oscillating"] for _, s, _ in seen] == [0.0, 0.25, 0.25] and seen[-1][1]["frozen"] == 0
    frequency = np.asarray(seen[-1][2].tracks["a"].frequency)[0]
    np.testing.assert_allclose(frequency, [0.1 + 0.9 * 0.1, 0, 0, 0], rtol=1e-5)


def test_what_swings_too_often_is_frozen_to_its_mean_code():
    swing = [[0.2, 0.0, 0.0, 0.0], [-0.2, 0.0, 0.0, 0.0]] * 3 + [[5.0, 1.0, 0.0, 0.0]]
    seen = run(swing, 0.5, 0.6)
    frozen = [s["frozen"] for _, s, _ in seen]
    assert frozen[0] == 0 and frozen[-1] == 0.25 and sorted(frozen) == frozen
    last, track = seen[-1][0], seen[-1][2].tracks["a"]
    assert last[0] == round(float(track.mean[0, 0])) and last[1] == 3.0  # the others go on
    assert bool(track.frozen[0, 0]) and not np.asarray(track.frozen)[0, 1:].any()


def test_a_frozen_code_stays_when_the_scale_moves():
    tx = track(optax.scale(1.0), {"a": FMT}, 0.5, 0.1)
    state, w = tx.init(W), W
    for sign in (1, -1, 1, -1, 1):
        updates, state = tx.update({"a": jnp.asarray([[0.2 * sign, 0, 0, 0]]), "a:scale": jnp.zeros((1, 1))}, state, w)
        w = optax.apply_updates(w, updates)
    assert bool(state.tracks["a"].frozen[0, 0])
    code = int(state.tracks["a"].code[0, 0])
    updates, state = tx.update({"a": jnp.zeros((1, 4)), "a:scale": jnp.full((1, 1), 0.5)}, state, w)
    w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w["a"][0, 0], code * 1.5, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ste", "ste-learned"])
def test_training_reports_and_freezes(recipe: str):
    plan = Plan.uniform("int2:g16").resolve(CONFIG.shapes())
    start = qat.get(recipe).prepare(params(), plan)
    settings = TrainConfig(
        steps=6, batch_size=4, lr=0.05, schedule="constant", log_every=1, freeze_above=0.2, freeze_momentum=0.5
    )
    done = train(start, rows(), language(CONFIG, settings), settings)
    last = done.history[-1]
    assert 0 < last["flip_rate"] < 1 and 0 < last["frozen"] < 1 and last["oscillating"] >= last["frozen"] / 2
    assert np.isfinite(np.asarray(dict(trees.items(done.params))["model.layers.0.mlp.up_proj"].w)).all()
    plain = TrainConfig(steps=1, batch_size=4)
    assert "flip_rate" not in train(start, rows(), language(CONFIG, plain), plain).history[-1]

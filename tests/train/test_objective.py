"""Losses against numpy in float64, masks, chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit.errors import InputError
from lowbit.train import objective
from lowbit.train.config import TrainConfig
from tests.models.tiny import forward, hidden_states

BASE = TrainConfig(batch_size=4)


def softmax64(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_terms_against_float64():
    rng = np.random.default_rng(0)
    t, s = rng.normal(0, 3, (5, 7)).astype(np.float32), rng.normal(0, 3, (5, 7)).astype(np.float32)
    target = np.arange(5, dtype=np.int32)
    p, q = softmax64(t), softmax64(s)
    np.testing.assert_allclose(
        objective.cross_entropy(jnp.asarray(s), jnp.asarray(target)), -np.log(q[np.arange(5), target]), rtol=1e-5
    )
    kl = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(objective.forward_kl(jnp.asarray(t), jnp.asarray(s)), kl, rtol=1e-4)
    assert np.abs(kl - (q * np.log(q / p)).sum(-1)).max() > 0.1  # the direction matters
    p, q = softmax64(t / 2.0), softmax64(s / 2.0)
    hot = objective.forward_kl(jnp.asarray(t), jnp.asarray(s), 2.0)
    np.testing.assert_allclose(hot, 4 * (p * np.log(p / q)).sum(-1), rtol=1e-4)


def kl64(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)


def test_reverse_kl_is_the_other_direction():
    rng = np.random.default_rng(0)
    t, s = rng.normal(0, 3, (5, 7)).astype(np.float32), rng.normal(0, 3, (5, 7)).astype(np.float32)
    for temperature in (1.0, 2.0):
        p, q = softmax64(t / temperature), softmax64(s / temperature)
        got = objective.reverse_kl(jnp.asarray(t), jnp.asarray(s), temperature)
        np.testing.assert_allclose(got, temperature**2 * kl64(q, p), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "coarse_kl"])
def test_a_divergence_and_its_gradient_are_zero_iff_the_logits_are_equal(name, temperature):
    """Equal up to a constant: logits that differ by one are the same distribution."""
    rng = np.random.default_rng(1)
    t = rng.normal(0, 3, (6, 9)).astype(np.float32)
    ids = np.argsort(-t, axis=-1)[:, :4].astype(np.int32)
    other = t.copy()
    np.put_along_axis(other, ids[:, 1:2], np.take_along_axis(t, ids[:, 1:2], -1) + np.float32(0.1), -1)
    cases = {"equal": t, "shifted": t + np.float32(2.0), "different": other}

    @jax.jit
    def f(t, s):
        if name != "coarse_kl":
            return getattr(objective, name)(t, s, temperature)
        which = jnp.asarray(ids)
        return objective.coarse_kl(objective.coarse(t / temperature, which), which, s, temperature)

    grad = jax.jit(jax.grad(lambda s: f(jnp.asarray(t), s).sum()))
    values = {k: np.asarray(f(jnp.asarray(t), jnp.asarray(s))) for k, s in cases.items()}
    grads = {k: np.abs(np.asarray(grad(jnp.asarray(s)))).max(-1) for k, s in cases.items()}
    for k in ("equal", "shifted"):
        assert np.abs(values[k]).max() < 2e-6 * temperature**2 and grads[k].max() < 2e-6 * temperature
    assert values["different"].min() > 1e-6 and grads["different"].min() > 1e-5


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_coarse_divergence_is_a_bound_that_is_exact_for_the_whole_vocabulary(direction):
    rng = np.random.default_rng(2)
    t, s = rng.normal(0, 3, (6, 11)).astype(np.float32), rng.normal(0, 3, (6, 11)).astype(np.float32)
    t[0, 3] = 60.0  # nothing is left for the tail
    p, q = softmax64(t), softmax64(s)
    full = kl64(p, q) if direction == "forward" else kl64(q, p)
    order = np.argsort(-t, axis=-1).astype(np.int32)
    before = np.zeros(6)
    for k in (1, 4, 10, 11):
        ids = order[:, :k]
        goal = objective.coarse(jnp.asarray(t), jnp.asarray(ids))
        got = np.asarray(objective.coarse_kl(goal, jnp.asarray(ids), jnp.asarray(s), 1.0, direction))
        pk, qk = (np.take_along_axis(a, ids, -1) for a in (p, q))
        if k < 11:
            mass = [np.take_along_axis(a, order[:, k:], -1).sum(-1, keepdims=True) for a in (p, q)]
            pk, qk = np.concatenate([pk, mass[0]], -1), np.concatenate([qk, mass[1]], -1)
        np.testing.assert_allclose(got, kl64(pk, qk) if direction == "forward" else kl64(qk, pk), rtol=2e-4, atol=1e-5)
        assert (got >= before - 1e-4).all() and (got <= full * (1 + 1e-4) + 1e-5).all()
        before = got
    np.testing.assert_allclose(before, full, rtol=2e-4)


def test_hidden_states_are_compared_in_units_of_the_teacher():
    student, teacher = params(0), params(1)
    batch = {k: jnp.asarray(v) for k, v in rows(2, 6, segments=True)(3).items()}
    inputs, _, segments, mask = objective.split(batch)
    x, y = (
        np.asarray(hidden_states(p, inputs, CONFIG, segments_BT=segments)[0], np.float64) for p in (student, teacher)
    )
    want = (np.square(x - y).mean(-1) / np.square(y).mean(-1))[np.asarray(mask)].sum()
    losses = {}
    for weight in (0.0, 0.5):
        config = dataclasses.replace(BASE, loss="ce", hidden_weight=weight, loss_chunk=4)
        f = jax.jit(objective.language(CONFIG, config, CONFIG if weight else None))
        losses[weight] = float(f(student, teacher, batch)[0])
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * want, rel=1e-3)
    assert not np.asarray(objective.hidden_distance(jnp.asarray(x), jnp.asarray(x))).any()


def test_split_masks_document_borders_and_padding():
    batch = {
        "tokens": jnp.asarray([[1, 2, 3, 4]]),
        "segments": jnp.asarray([[0, 0, 1, 1]]),
        "mask": jnp.asarray([[1, 1, 0]]),
    }
    inputs, targets, segments, mask = objective.split(batch)
    assert inputs.tolist() == [[1, 2, 3]] and targets.tolist() == [[2, 3, 4]]
    assert segments.tolist() == [[0, 0, 1]] and mask.tolist() == [[True, False, False]]


@pytest.mark.parametrize("loss", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("ce", "mixed")), "mixed reverse"])
def test_language_is_the_masked_sum_whatever_the_chunk(loss):
    student, teacher = params(0), params(1)
    batch = {k: jnp.asarray(v) for k, v in rows(2, 10, segments=True)(3).items()}
    inputs, targets, segments, mask = map(np.asarray, objective.split(batch))
    logits = forward(student, jnp.asarray(inputs), CONFIG, segments_BT=jnp.asarray(segments))
    q = softmax64(logits)
    want = -np.log(np.take_along_axis(q, targets[..., None], -1))[..., 0]
    if loss != "ce":
        p = softmax64(forward(teacher, jnp.asarray(inputs), CONFIG, segments_BT=jnp.asarray(segments)))
        want = 0.25 * want + 0.75 * (kl64(p, q) if loss == "mixed" else kl64(q, p))
    want = want[mask].sum()
    grads = []
    for chunk in (0, 4):  # 4 does not divide 10
        config = dataclasses.replace(BASE, loss=loss.split()[0], kl_weight=0.75, loss_chunk=chunk)
        config = dataclasses.replace(config, kl_direction="reverse" if loss.endswith("reverse") else "forward")
        f = objective.language(CONFIG, config, CONFIG)
        (total, n), g = jax.jit(jax.value_and_grad(f, has_aux=True))(student, teacher, batch)
        assert float(n) == mask.sum() < mask.size
        assert float(total) == pytest.approx(want, rel=1e-4)
        grads.append(g)
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_chunks_never_hold_all_logits():
    big = dataclasses.replace(CONFIG, vocab_size=4096, tied=True)
    shapes = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in big.shapes().items()}
    from lowbit import tree as trees

    batch = {"tokens": jax.ShapeDtypeStruct((4, 65), jnp.int32)}
    temp = []
    for chunk in (0, 8):
        f = objective.language(big, dataclasses.replace(BASE, loss_chunk=chunk))
        step = jax.jit(jax.value_and_grad(f, has_aux=True))
        plan = step.lower(trees.build(shapes), None, batch).compile().memory_analysis()
        temp.append(plan.temp_size_in_bytes)
    assert temp[1] < temp[0] / 2 and temp[0] > 4 * 64 * 4096 * 4


def test_kl_needs_a_teacher_with_the_same_vocabulary():
    with pytest.raises(InputError, match="loss 'kl' without a teacher"):
        objective.language(CONFIG, dataclasses.replace(BASE, loss="kl"))
    with pytest.raises(InputError, match="vocabulary of 65 tokens .allowed: the student's 64"):
        objective.language(CONFIG, dataclasses.replace(BASE, loss="kl"), dataclasses.replace(CONFIG, vocab_size=65))


def test_hidden_states_need_a_teacher_of_the_same_width():
    config = dataclasses.replace(BASE, hidden_weight=1.0)
    with pytest.raises(InputError, match="hidden_weight 1.0 without a teacher"):
        objective.language(CONFIG, config)
    with pytest.raises(InputError, match="hidden states of 48 values .allowed: 0, or the student's 32"):
        objective.language(CONFIG, config, dataclasses.replace(CONFIG, hidden_size=48))
    with pytest.raises(InputError, match="hidden_weight is 1.0 with cached logits"):
        objective.language(CONFIG, config, cached=True)
    with pytest.raises(InputError, match="hidden_weight is -1.0"):
        TrainConfig(hidden_weight=-1.0)

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
from tests.models.tiny import forward

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


def test_split_masks_document_borders_and_padding():
    batch = {
        "tokens": jnp.asarray([[1, 2, 3, 4]]),
        "segments": jnp.asarray([[0, 0, 1, 1]]),
        "mask": jnp.asarray([[1, 1, 0]]),
    }
    inputs, targets, segments, mask = objective.split(batch)
    assert inputs.tolist() == [[1, 2, 3]] and targets.tolist() == [[2, 3, 4]]
    assert segments.tolist() == [[0, 0, 1]] and mask.tolist() == [[True, False, False]]


@pytest.mark.parametrize("loss", [pytest.param("ce", marks=pytest.mark.slow), "mixed"])
def test_language_is_the_masked_sum_whatever_the_chunk(loss):
    student, teacher = params(0), params(1)
    batch = {k: jnp.asarray(v) for k, v in rows(2, 10, segments=True)(3).items()}
    inputs, targets, segments, mask = map(np.asarray, objective.split(batch))
    logits = forward(student, jnp.asarray(inputs), CONFIG, segments_BT=jnp.asarray(segments))
    q = softmax64(logits)
    want = -np.log(np.take_along_axis(q, targets[..., None], -1))[..., 0]
    if loss == "mixed":
        p = softmax64(forward(teacher, jnp.asarray(inputs), CONFIG, segments_BT=jnp.asarray(segments)))
        want = 0.25 * want + 0.75 * (p * np.log(p / q)).sum(-1)
    want = want[mask].sum()
    grads = []
    for chunk in (0, 4):  # 4 does not divide 10
        config = dataclasses.replace(BASE, loss=loss, kl_weight=0.75, loss_chunk=chunk)
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

"""Schedules, groups, decay and every optimizer by name."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.train import optimizer
from lowbit.train.config import OPTIMIZERS, TrainConfig

BASE = TrainConfig(steps=100, lr=1.0, warmup=10, lr_end=0.1)
PARAMS = {
    "model.embed_tokens": np.ones((6, 4), np.float32),
    "model.layers.0.mlp.up_proj": np.ones((6, 4), np.float32),
    "model.layers.0.mlp.up_proj:scale": np.ones((6, 2), np.float32),
    "model.layers.0.mlp.up_proj.bias": np.ones(6, np.float32),
    "model.norm": np.ones(4, np.float32),
}


@pytest.mark.parametrize(
    "name, points",
    [
        ("constant", {0: 0.1, 9: 1.0, 99: 1.0}),
        ("linear", {4: 0.5, 10: 1.0, 99: 0.1}),
        ("cosine", {9: 1.0, 10: 1.0, 99: 0.1, 500: 0.1}),
        ("wsd", {9: 1.0, 80: 1.0, 99: 0.1}),
    ],
)
def test_schedules(name, points):
    f = optimizer.schedule(dataclasses.replace(BASE, schedule=name))
    values = np.asarray(jax.jit(f)(np.arange(501)))
    for step, lr in points.items():
        assert values[step] == pytest.approx(lr, abs=1e-6), step
    if name != "constant":
        assert (np.diff(values[10:100]) <= 0).all()


def step(config, grads=None):
    scale = optimizer.factors(PARAMS, config)
    tx = optimizer.build(config, PARAMS, scale)
    rng = np.random.default_rng(0)
    grads = grads or {n: rng.normal(size=a.shape).astype(np.float32) for n, a in PARAMS.items()}
    updates = jax.jit(lambda g: tx.update(g, tx.init(PARAMS), PARAMS)[0])(grads)
    return jax.tree.map(np.asarray, updates), grads


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends_and_scales_by_group(name):
    config = dataclasses.replace(BASE, optimizer=name, schedule="constant", warmup=0, lr=0.5, scale_lr=0.25)
    grouped = dataclasses.replace(config, lr_groups=((r".*norm", 2.0), (r".*\.bias", 0.5)))
    (a, grads), (b, _) = step(config), step(grouped)
    for n in PARAMS:
        assert float(np.sum(a[n] * grads[n])) < 0, n
    np.testing.assert_allclose(b["model.norm"], 2 * a["model.norm"], rtol=1e-6)
    np.testing.assert_allclose(
        b["model.layers.0.mlp.up_proj.bias"], 0.5 * a["model.layers.0.mlp.up_proj.bias"], rtol=1e-6
    )
    full = step(dataclasses.replace(config, scale_lr=1.0))[0]
    name = "model.layers.0.mlp.up_proj:scale"
    np.testing.assert_allclose(a[name], 0.25 * full[name], rtol=1e-6)


def test_muon_orthogonalises_linears_only():
    u = step(dataclasses.replace(BASE, optimizer="muon", schedule="constant", warmup=0))[0]
    values = np.linalg.svd(np.asarray(u["model.layers.0.mlp.up_proj"]), compute_uv=False)
    assert values.max() / values.min() < 2  # Newton-Schulz leaves singular values near each other
    size = np.abs(np.asarray(u["model.embed_tokens"]))
    np.testing.assert_allclose(size, size.mean(), rtol=1e-3)  # Adam's first step is a multiple of the sign


def test_decay_touches_linears_only():
    zero = {n: np.zeros_like(a) for n, a in PARAMS.items()}
    config = dataclasses.replace(BASE, weight_decay=0.1, schedule="constant", warmup=0, lr=0.5)
    u = step(config, zero)[0]
    moved = {n for n in PARAMS if float(np.abs(u[n]).max()) > 0}
    assert moved == {"model.layers.0.mlp.up_proj"}
    np.testing.assert_allclose(u["model.layers.0.mlp.up_proj"], -0.05, rtol=1e-6)


def test_clipping_is_global():
    config = dataclasses.replace(BASE, optimizer="sgd", b1=0.0, clip=1.0, schedule="constant", warmup=0, scale_lr=1.0)
    u = step(config)[0]
    assert float(np.sqrt(sum(np.sum(np.square(a)) for a in u.values()))) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "match, factor, words",
    [
        ("nothing", 1.0, "lr_groups: 'nothing' matches nothing"),
        ("(", 1.0, "lr_groups: '(' is not a regular expression"),
        (".*", -1.0, "factor of '.*' is -1.0 (allowed: at least 0)"),
    ],
)
def test_group_refusals(match, factor, words):
    with pytest.raises(InputError) as e:
        optimizer.factors(PARAMS, dataclasses.replace(BASE, lr_groups=((match, factor),)))
    assert words in str(e.value)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("optimizer", "adamww", "unknown optimizer 'adamww'; did you mean 'adamw'"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("steps", 0, "steps is 0 (allowed: at least 1)"),
        ("lr", float("nan"), "lr is nan"),
        ("lr_end", 1.5, "lr_end is 1.5 (allowed: at least 0 and at most 1)"),
        ("microbatches", 3, "microbatches is 3 (allowed: a divisor of batch_size 8)"),
        ("warmup", 101, "warmup is 101 (allowed: at most steps, 100)"),
        ("mesh", (-1, -1, 1), "at most one of them -1"),
        ("temperature", 0.0, "temperature is 0.0"),
    ],
)
def test_config_refusals(field, value, words):
    # Values come from files and flags, which the annotations of the constructor do not check outside of the tests.
    fields = {f.name: getattr(BASE, f.name) for f in dataclasses.fields(BASE)}
    with pytest.raises(InputError) as e:
        TrainConfig.__post_init__(SimpleNamespace(**fields | {field: value}))
    assert words in str(e.value)


def test_adam_refuses_decay():
    with pytest.raises(InputError, match="weight_decay is 0.1 with optimizer 'adam'"):
        dataclasses.replace(BASE, optimizer="adam", weight_decay=0.1)

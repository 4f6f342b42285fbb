import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.models import decoder
from lowbit.models.cache import init_cache
from tests.models.tiny import CONFIGS, LLAMA, forward, hidden_states, params_of, quantized, tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 14)), jnp.int32)
MIXED = {"model.layers.1.mlp.up_proj": "int4:g16"}


def loss(params, config, **options):
    logits = forward(params, TOKENS, config, **options)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], -1).mean()


@pytest.mark.parametrize("policy", ["full", pytest.param("dots", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.slow), "mixed"])
def test_remat_gives_the_same_gradients(policy, name):
    model = quantized(tiny(), MIXED, latent=True) if name == "mixed" else tiny(name)
    gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1, static_argnames="remat")
    want, wanted = gradients(model.params, model.config)
    got, grads = gradients(model.params, model.config, remat=policy)
    assert got == pytest.approx(float(want), abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), grads, wanted)


def test_remat_really_recomputes():
    model = tiny()
    count = lambda policy: str(  # noqa: E731
        jax.make_jaxpr(jax.grad(loss), static_argnums=1)(model.params, model.config)
        if policy == "none"
        else jax.make_jaxpr(jax.grad(lambda p: loss(p, model.config, remat=policy)))(model.params)
    ).count("remat")
    assert count("none") == 0 and count("full") > 0 and count("dots") > 0


def test_unknown_remat_policy():
    with pytest.raises(InputError, match="unknown remat policy 'some'.*dots"):
        loss(tiny().params, LLAMA, remat="some")


def test_equal_layers_scan_and_the_odd_one_is_unrolled(monkeypatch):
    monkeypatch.setattr(decoder, "SCAN_FROM", 2)
    config = dataclasses.replace(LLAMA, num_layers=5)
    params = params_of(config)
    layers = lambda p: [p["model"]["layers"][str(i)] for i in range(5)]  # noqa: E731
    assert decoder._runs(layers(params), 5) == [(0, 5)]
    assert decoder._runs(layers(params), 6) == [(i, i + 1) for i in range(5)]
    mixed = quantized(tiny(num_layers=5), {"model.layers.2.mlp.up_proj": "int4:g16"})
    assert decoder._runs(layers(mixed.params), 2) == [(0, 2), (2, 3), (3, 5)]
    both = quantized(tiny(num_layers=5), {f"model.layers.{i}.mlp.up_proj": "int4:g16" for i in (2, 3)})
    assert decoder._runs(layers(both.params), 2) == [(0, 2), (2, 4), (4, 5)]
    for model in (mixed, both):
        plain = trees.map_leaves(lambda _, a: a if isinstance(a, jax.Array) else a.decode(), model.params)
        want = forward(plain, TOKENS, config)
        np.testing.assert_allclose(forward(model.params, TOKENS, config), want, atol=2e-5)
        jaxpr = str(jax.make_jaxpr(lambda p: forward(p, TOKENS, config))(model.params))
        assert jaxpr.count("= scan[") >= 1


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "gemma3", "bit"])
def test_scan_equals_unrolled(name):
    model = tiny(name)
    scanned, _ = hidden_states(model.params, TOKENS, model.config, scan=True)
    unrolled, _ = hidden_states(model.params, TOKENS, model.config, scan=False)
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_segments_are_separate_documents(name):
    model = tiny(name)
    segments = jnp.asarray([[0] * 6 + [1] * 8] * 2, jnp.int32)
    got = np.asarray(forward(model.params, TOKENS, model.config, segments_BT=segments))
    parts = [forward(model.params, TOKENS[:, a:b], model.config) for a, b in ((0, 6), (6, 14))]
    np.testing.assert_allclose(got, np.concatenate(parts, axis=1), atol=2e-4)
    assert np.abs(got - forward(model.params, TOKENS, model.config)).max() > 0.01


def test_padding_at_the_right_changes_nothing():
    model = tiny("gemma3")
    rows, counts = [TOKENS[0], TOKENS[1, :9]], jnp.asarray([14, 9], jnp.int32)
    padded = jnp.stack([TOKENS[0], jnp.concatenate([TOKENS[1, :9], jnp.zeros(5, jnp.int32)])])
    cache = init_cache(model.params, model.config, 2, 16)
    run = jax.jit(lambda tokens, **options: hidden_states(model.params, tokens, model.config, **options))
    got, cache = run(padded, cache=cache, count_B=counts)
    assert cache.length.tolist() == [14, 9]
    after, _ = run(jnp.asarray([[3], [3]]), cache=cache)
    for h, last, row in zip(got, after, rows):
        want, _ = run(jnp.concatenate([row, jnp.asarray([3])])[None])
        np.testing.assert_allclose(jnp.concatenate([h[: len(row)], last]), want[0], atol=2e-4)


@pytest.mark.parametrize("name", ["gemma3", "bit"])
def test_causal(name):
    model = tiny(name)
    changed = TOKENS.at[:, 9].set((TOKENS[:, 9] + 1) % 61)
    a, b = np.asarray(model.logits(TOKENS)), np.asarray(model.logits(changed))
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.abs(a[:, 9] - b[:, 9]).max() > 1e-3


def test_refusals():
    model = tiny()
    with pytest.raises(InputError, match="sequence of 65 tokens .*64"):
        forward(model.params, jnp.zeros((1, 65), jnp.int32), model.config)
    cache = init_cache(model.params, model.config, 2, 16)
    with pytest.raises(InputError, match="segments together with a cache"):
        hidden_states(model.params, TOKENS, model.config, cache=cache, segments_BT=TOKENS)


def test_second_call_does_not_recompile(monkeypatch):
    traces = []
    original = decoder.hidden_states
    monkeypatch.setattr(decoder, "hidden_states", lambda *a, **k: traces.append(1) or original(*a, **k))
    model = tiny(vocab_size=57)
    model.logits([[1, 2, 3]])
    tiny(vocab_size=57).logits([[4, 5, 6]])
    assert len(traces) == 1


def test_bfloat16_computes_in_bfloat16():
    model = tiny(dtype=jnp.bfloat16)
    low = np.asarray(model.logits(TOKENS, dtype=jnp.bfloat16))
    full = np.asarray(model.logits(TOKENS))
    assert low.dtype == np.float32
    assert 1e-4 < np.linalg.norm(low - full) / np.linalg.norm(full) < 0.05


def test_init_matches_the_declared_shapes():
    for config in CONFIGS.values():
        params = decoder.init_params(config, jax.random.key(0))
        assert {p: a.shape for p, a in trees.items(params)} == config.shapes()
        assert sum(a.size for a in jax.tree.leaves(params)) == config.num_params

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.models import generate as g
from lowbit.models.cache import init_cache
from lowbit.models.decoder import head, hidden_states
from tests.models.tiny import CONFIGS, quantized, tiny

PROMPTS = [[1, 5, 9, 33, 20], [1], [1, 7, 60, 3, 12, 44, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


CASES = [("llama", False), ("mistral", False), ("gemma3", False), ("llama", True), ("gemma3", True)]
CASES += [pytest.param(n, False, marks=pytest.mark.slow) for n in CONFIGS if (n, False) not in CASES]


@pytest.mark.parametrize("name, scan", CASES)
def test_cached_logits_equal_the_full_forward(name, scan):
    model = tiny(name)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 20)), jnp.int32)
    want = np.asarray(model.logits(x))
    cache = init_cache(model.params, model.config, 2, 24)
    got = []
    advance = jax.jit(lambda c, t: hidden_states(model.params, t, model.config, cache=c, scan=scan))
    for a, b in [(0, 6), (6, 7), (7, 8), (8, 14), (14, 20)]:
        h, cache = advance(cache, x[:, a:b])
        got.append(head(model.params, h, model.config))
    assert cache.length.tolist() == [20, 20]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-4)


def naive(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        padded = np.zeros(32, np.int32)  # causal: what follows is not seen
        padded[: len(ids)] = ids
        ids.append(int(np.argmax(model.logits(padded)[len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_ragged_batch_equals_one_by_one_equals_no_cache(name):
    model = tiny(name)
    together = g.generate(model, PROMPTS, 10, stop_at_eos=False)
    assert together == [g.generate(model, [p], 10, stop_at_eos=False)[0] for p in PROMPTS]
    assert together == [naive(model, p, 10) for p in PROMPTS]
    assert together[2] == list(g.stream(model, PROMPTS[2], 10, stop_at_eos=False))


def test_packed_weights_generate_what_their_values_generate():
    paths = {f"model.layers.{i}.mlp.up_proj": "int4:g16" for i in range(3)}
    packed = quantized(tiny(), paths)
    plain = packed.replace(params=jax.tree.map(lambda q: q, packed.params))
    for i in range(3):
        mlp = plain.params["model"]["layers"][str(i)]["mlp"]
        mlp["up_proj"] = mlp["up_proj"].decode()
    assert g.generate(packed, PROMPTS, 6) == g.generate(plain, PROMPTS, 6)


def test_one_program_for_all_steps(monkeypatch):
    traces = []
    monkeypatch.setattr(g, "hidden_states", lambda *a, **k: traces.append(a[1].shape) or hidden_states(*a, **k))
    model = tiny(vocab_size=59)  # a config that no other test has compiled
    g.generate(model, [[3, 4, 5]], 12, stop_at_eos=False)
    g.generate(model, [[3, 4, 5, 6, 7]], 12, stop_at_eos=False)
    assert traces == [(1, 16), (1, 1)]


def test_eos_stops_a_row_and_is_left_out():
    model = tiny()
    free = g.generate(model, PROMPTS, 12, stop_at_eos=False)
    eos = free[0][4]
    stopped = g.generate(tiny(eos_token_ids=(eos,)), PROMPTS, 12)
    for a, b in zip(free, stopped):
        assert b == (a[: a.index(eos)] if eos in a else a)
    assert eos not in list(g.stream(tiny(eos_token_ids=(eos,)), PROMPTS[0], 12))


def test_sampling_keeps_to_its_options_and_its_seed():
    model = tiny()
    draw = lambda **k: g.generate(model, [[1, 2, 3]] * 4, 8, stop_at_eos=False, **k)  # noqa: E731
    hot = draw(temperature=2.0, seed=1)
    assert hot == draw(temperature=2.0, seed=1)
    assert hot != draw(temperature=2.0, seed=2)
    assert len({tuple(r) for r in hot}) == 4
    greedy = draw()
    assert draw(temperature=2.0, top_k=1) == greedy
    assert draw(temperature=1.0, top_p=1e-6) == greedy
    assert draw(temperature=1e-4) == greedy


def test_top_p_cuts_where_it_should():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    seen = {int(g._choose(logits, jax.random.key(i), 1.0, 0.8, None, False)[0]) for i in range(200)}
    assert seen == {0, 1}
    seen = {int(g._choose(logits, jax.random.key(i), 1.0, 0.81, None, False)[0]) for i in range(200)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    "prompts, n, options, message",
    [
        ([[1] * 60], 5, {}, "prompt 0 of 60 tokens and 5 new ones .*64"),
        ([[1], []], 5, {}, "prompt 1 is empty"),
        ([[1, 61]], 5, {}, "token ids up to 61 .*0 to 60"),
        ([[1]], -1, {}, "max_tokens is -1"),
        ([[1]], 1, {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], 1, {"top_k": 0}, "top_k is 0"),
        ([[1]], 1, {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_refusals(prompts, n, options, message):
    with pytest.raises(InputError, match=message):
        g.generate(tiny(), prompts, n, **options)
    assert len(g.generate(tiny(), [[1] * 60], 4, stop_at_eos=False)[0]) == 4

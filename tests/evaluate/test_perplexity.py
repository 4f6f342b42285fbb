"""Perplexity and divergence equal a plain float64 computation, whatever the batching, and refuse what cannot be."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.evaluate import perplexity
from lowbit.evaluate.perplexity import evaluate, windows_of
from tests.evaluate import tiny
from tests.models.tiny import forward
from tests.shared import shared_path

KEYS = {
    "nats_per_token",
    "perplexity",
    "perplexity_stderr",
    "convention",
    "bits_per_byte",
    "tokens",
    "windows",
    "file_bytes",
    "bits_per_weight",
    "bits_per_weight_quantized",
}
KL_KEYS = {"kl_mean", "kl_mean_stderr", "kl_median", "kl_p90", "kl_p99", "kl_p99_9", "same_top1"}


@pytest.fixture(scope="module")
def models():
    return tiny.model(0), tiny.model(0).replace(params=tiny.model(1).params)


def plain(model, reference, w):
    """The same numbers in float64 numpy from whole logits."""
    logp = [
        tiny.log_softmax(np.asarray(forward(m.params, jnp.asarray(w.tokens), m.config))) for m in (model, reference)
    ]
    at = w.scored[:, 1:]
    nll = -np.take_along_axis(logp[0][:, :-1], w.tokens[:, 1:, None], -1)[..., 0][at]
    q, p = (x[:, :-1][at] for x in logp)
    return nll, (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


@pytest.mark.parametrize("convention", ["gptq-32", "llamacpp-32"])
def test_equals_a_plain_computation(models, convention, monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGIT_FLOATS", 258 * 10)  # ten positions at a time
    model, reference = models
    out = evaluate(model, tiny.TEXT, reference, convention, batch=3)
    w = windows_of(model, tiny.TEXT, convention)
    assert len(w.tokens) % 3  # the last batch is padded
    nll, kl, same = plain(model, reference, w)
    assert set(out) == KEYS | KL_KEYS and out["convention"] == convention
    assert out["tokens"] == nll.size == w.scored.sum() and out["windows"] == len(w.tokens)
    assert out["nats_per_token"] == pytest.approx(nll.mean(), rel=1e-5)
    assert out["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    llama_cpp = math.exp(nll.mean()) * math.sqrt((np.mean(nll**2) - nll.mean() ** 2) / (nll.size - 1))
    assert out["perplexity_stderr"] == pytest.approx(llama_cpp, rel=1e-4)
    assert out["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4) and kl.mean() > 0.1
    for key, q in {"kl_median": 50, "kl_p90": 90, "kl_p99": 99, "kl_p99_9": 99.9}.items():
        assert out[key] == pytest.approx(np.percentile(kl, q), rel=1e-4)
    assert out["kl_mean_stderr"] == pytest.approx(kl.std(ddof=1) / math.sqrt(kl.size), rel=1e-3)
    assert out["same_top1"] == pytest.approx(same.mean())
    scored = w.tokens[w.scored]
    assert out["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / (scored < 256).sum(), rel=1e-5)


def test_batching_changes_nothing(models):
    model, reference = models
    one, other = (evaluate(model, tiny.TEXT, reference, "gptq-32", batch=b) for b in (1, 64))
    for key in KEYS | KL_KEYS:
        if isinstance(one[key], float):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_a_model_does_not_diverge_from_itself(models):
    out = evaluate(models[0], tiny.TEXT, models[0], "gptq-32")
    assert out["kl_mean"] == out["kl_p99_9"] == 0 and out["same_top1"] == 1


def test_self_noise_is_the_reference_in_bfloat16(models):
    model, reference = models
    out = evaluate(model, tiny.TEXT, reference, "gptq-32", self_noise=True)
    noise = out["self_noise"]
    assert set(out) == KEYS | KL_KEYS | {"self_noise"}
    assert 0 < noise["kl_mean"] < 0.1 * out["kl_mean"] and KL_KEYS <= set(noise)
    assert noise["nats_per_token"] == pytest.approx(
        evaluate(reference, tiny.TEXT, None, "gptq-32")["nats_per_token"], rel=0.05
    )
    with pytest.raises(InputError, match="self_noise without a reference"):
        evaluate(model, tiny.TEXT, self_noise=True)


def test_the_same_shape_compiles_once(models):
    evaluate(models[0], tiny.TEXT, models[1], "gptq-16", batch=4)
    before = perplexity._score._cache_size()
    evaluate(models[1], tiny.TEXT[:-60], models[0], "gptq-16", batch=4)
    assert perplexity._score._cache_size() == before


def test_refusals(models):
    model, _ = models
    small = dataclasses.replace(tiny.CONFIG, vocab_size=100)
    broken = dict(model.params, model=dict(model.params["model"], norm=jnp.full(32, jnp.nan)))
    odd = tiny.model()
    odd.tokenizer.adds_bos = False
    for call, says in [
        (lambda: evaluate(model.replace(tokenizer=None), tiny.TEXT), "no tokenizer"),
        (lambda: evaluate(model.replace(config=small), tiny.TEXT), "tokenizer gives id"),
        (lambda: evaluate(model, tiny.TEXT, model.replace(config=small)), "vocabulary of 100"),
        (lambda: evaluate(model, tiny.TEXT, odd), "tokenises the text differently"),
        (lambda: evaluate(model.replace(params=broken), tiny.TEXT), "not finite"),
        (lambda: evaluate(model, "short"), "one window of gptq-64"),
    ]:
        with pytest.raises(InputError, match=says) as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("path", "nats", "bits"),
    [
        ("stories260K/stories260K.bin", 1.504, 1.089),
        pytest.param("bit-llama2/bit_model_1M.bin", 1.557, 1.127, marks=pytest.mark.slow),
        pytest.param("bit-llama2/bit_model_3M.bin", 1.420, 1.028, marks=pytest.mark.slow),
    ],
)
def test_published_figures(path, nats, bits):
    from lowbit.models.llama2c import load_llama2c

    model = load_llama2c(shared_path("data/models") / path)
    text = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_bytes().decode()
    out = evaluate(model, text, convention="stories-256", batch=15)
    assert out["windows"] == 60
    # The figures have three decimals; where inputs are int8, the last bit of a product decides roundings further on,
    # which moves the mean by 1e-4 (products of integers: 1.41945 nats, of the same values as floats: 1.41954).
    assert out["nats_per_token"] == pytest.approx(nats, abs=7e-4)
    assert out["bits_per_byte"] == pytest.approx(bits, abs=7e-4)
    assert out["file_bytes"] == (shared_path("data/models") / path).stat().st_size

"""llama.cpp's KL base file: our reader against our writer and against the layout byte by byte."""

import dataclasses
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.evaluate.kld_file import KldFile, evaluate_against_kld, quantize_logits, write_kld
from lowbit.evaluate.perplexity import evaluate, windows_of
from tests.evaluate import tiny
from tests.models.tiny import forward


@pytest.fixture(scope="module")
def models():
    return tiny.model(0), tiny.model(0).replace(params=tiny.model(1).params)


def test_layout(tmp_path, models):
    model, _ = models
    count = write_kld(model, tiny.TEXT, tmp_path / "x.kld", n_ctx=16)
    data = (tmp_path / "x.kld").read_bytes()
    w = windows_of(model, tiny.TEXT, "llamacpp-16")
    assert data[:8] == b"_logits_" and struct.unpack_from("<3i", data, 8) == (16, 258, count) and count == len(w.tokens)
    assert np.array_equal(np.frombuffer(data, "<i4", count * 16, 20), w.tokens.ravel())
    width = 2 * 129 + 4
    assert len(data) == 20 + 4 * count * 16 + 2 * count * 7 * width
    logits = np.asarray(forward(model.params, jnp.asarray(w.tokens[:1]), model.config))[0, 8:15]
    at = 20 + 4 * count * 16
    for s in range(7):
        scale, low = struct.unpack_from("<2f", data, at + 2 * s * width)
        codes = np.frombuffer(data, "<u2", 258, at + 2 * s * width + 8)
        expected = tiny.log_softmax(logits[s])
        kept = logits[s] > logits[s].max() - 16
        assert np.abs(scale * codes.astype(np.float64) + low - expected)[kept].max() < 16 / 65535
        assert (codes[~kept] == 0).all()


def test_reader_gives_the_log_probabilities_back(tmp_path, models):
    model, _ = models
    write_kld(model, tiny.TEXT, tmp_path / "x.kld", n_ctx=16)
    base = KldFile(tmp_path / "x.kld")
    assert (base.n_ctx, base.n_vocab) == (16, 258)
    for c in (0, base.windows - 1):
        p = base.log_probs(c)
        logits = np.asarray(forward(model.params, jnp.asarray(base.tokens[c : c + 1]), model.config))[0, 8:15]
        q = tiny.log_softmax(logits)
        assert p.dtype == np.float32 and np.abs(p - q)[q > -12].max() < 3e-4
        assert (np.exp(q) * (q - p)).sum(-1).max() < 1e-3


@pytest.mark.parametrize("vocab", [5, 6])
def test_odd_vocabulary_and_flat_logits(vocab):
    logits = np.zeros((2, vocab), np.float32)
    logits[1, 0] = 40
    record = quantize_logits(logits)
    assert record.shape == (2, 2 * ((vocab + 1) // 2) + 4)
    head = np.ascontiguousarray(record[:, :4]).view("<f4")
    assert head[0, 0] == 0 and head[0, 1] == pytest.approx(-np.log(vocab))
    p = record[:, 4 : 4 + vocab] * head[:, :1] + head[:, 1:]
    assert p[1, 0] == pytest.approx(0, abs=1e-3) and p[1, 1] == pytest.approx(-16, abs=1e-3)


def test_evaluation_against_a_file_agrees_with_the_model_itself(tmp_path, models):
    model, reference = models
    write_kld(reference, tiny.TEXT, tmp_path / "x.kld", n_ctx=16)
    ours = evaluate_against_kld(model, tmp_path / "x.kld")
    exact = evaluate(model, tiny.TEXT, reference, "llamacpp-16")
    assert set(ours) == set(exact) and ours["convention"] == "llamacpp-16" and ours["tokens"] == exact["tokens"]
    for key in ("nats_per_token", "perplexity", "bits_per_byte", "kl_mean", "kl_median", "kl_p99", "same_top1"):
        assert ours[key] == pytest.approx(exact[key], rel=2e-3)
    itself = evaluate_against_kld(reference, tmp_path / "x.kld")
    assert abs(itself["kl_mean"]) < 1e-4 and itself["same_top1"] > 0.999


def test_damaged_or_foreign_files(tmp_path, models):
    model, _ = models
    path = tmp_path / "x.kld"
    write_kld(model, tiny.TEXT, path, n_ctx=16)
    data = path.read_bytes()
    for content, says in [
        (data[:-1], "bytes"),
        (data + b"x", "bytes"),
        (b"GGUF" + data[4:], "starts with"),
        (data[:10], "starts with"),
        (data[:8] + struct.pack("<3i", 16, -1, 1), "positive"),
        (data[:20] + struct.pack("<i", 300) + data[24:], "token 300"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=says):
            KldFile(path)
    with pytest.raises(InputError, match="cannot read"):
        KldFile(tmp_path / "missing")
    path.write_bytes(data)
    for change, says in [({"vocab_size": 300}, "vocabulary of 258"), ({"max_position": 8}, "windows of 16")]:
        other = model.replace(config=dataclasses.replace(model.config, **change))
        with pytest.raises(InputError, match=says):
            evaluate_against_kld(other, path)
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate_against_kld(model.replace(tokenizer=None), path)

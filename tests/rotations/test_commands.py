"""`lowbit transform`, and `lowbit quantize --transform`: what they write, keep and refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.models.cache import CacheSite
from lowbit.models.hf import load_hf, save_hf
from lowbit.tree import items
from tests.models.tiny import tiny

RULES = r"""
[[rule]]
match = 'model\.layers\..*:in'
format = "int4:token"

[[rule]]
match = 'model\.layers\..*\.k_cache'
format = "int4:token:asym"

[[rule]]
match = 'model\.layers\..*'
format = "int4"
"""
TOKENS = np.arange(40) % 250


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("llama3", vocab_size=258).replace(tokenizer=ByteTokenizer())
    save_hf(model, tmp_path / "m", dtype=None)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "rules.toml").write_text(RULES)
    return model


def run(capsys, command: str) -> dict:
    assert main([*command.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, command: str) -> str:
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("lowbit: error: ") and err.count("\n") == 1
    return err


def test_what_folds_is_plain_and_what_does_not_is_packed(model, capsys):
    want = np.asarray(model.logits(TOKENS))
    out = run(capsys, "transform m --name quarot:r1 --out merged")
    assert out["folder"] == "plain" and out["online"] == out["caches"] == 0
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    out = run(capsys, "transform m --name quarot --out online --save q.safetensors")
    assert out["folder"] == "packed" and out["online"] == 6 and out["caches"] == 3
    for folder in ("merged", "online"):
        np.testing.assert_allclose(load_hf(folder).logits(TOKENS), want, atol=1e-4 * np.abs(want).max())
    run(capsys, "transform m --name q.safetensors --out again")
    assert (np.asarray(load_hf("again").logits(TOKENS)) == np.asarray(load_hf("online").logits(TOKENS))).all()


@pytest.mark.slow
def test_quantize_with_a_transform_is_the_transform_and_then_quantize(model, capsys):
    """Inputs, weights and caches by rules; a transformed folder goes block by block, to the same bits."""
    run(capsys, "transform m --name quarot --out rotated")
    run(capsys, "quantize rotated --rules rules.toml --out a")
    run(capsys, "quantize m --transform quarot --rules rules.toml --out b")
    a, b = load_hf("a"), load_hf("b")
    assert (np.asarray(a.logits(TOKENS)) == np.asarray(b.logits(TOKENS))).all()
    site = dict(items(a.params))["model.layers.1.self_attn.k_cache"]
    assert isinstance(site, CacheSite) and site.name == "int4:token:asym + hadamard:8"
    kl = run(capsys, "eval b --text text.txt --against m --convention gptq-32")["kl_mean"]
    assert 1e-3 < kl < 5
    assert run(capsys, "generate b --tokens 4 --prompt The")["token_ids"]


@pytest.mark.slow
def test_learned_transforms_and_gptq_take_the_calibration_text(model, capsys):
    flags = "--calib text.txt --gptq.rows 8 --gptq.length 32 --transform smoothquant:n8"
    run(capsys, f"quantize m {flags} --solver gptq --rules rules.toml --out q")
    assert load_hf("q").logits(TOKENS).shape == (40, 258)


def test_static_w8a8_with_smoothquant(model, capsys, tmp_path):
    """The paper's O3: scales of inputs from calibration, after the folding; by folder and in memory the same."""
    rules = RULES.replace("int4:token:asym", "int8").replace("int4:token", "int8:tensor").replace('"int4"', '"int8"')
    (tmp_path / "w8a8.toml").write_text(rules)
    assert "stores its scale" in refused(capsys, "quantize m --rules w8a8.toml --out x")
    run(capsys, "transform m --name smoothquant:n8 --calib text.txt --out smooth")
    run(capsys, "quantize smooth --rules w8a8.toml --calib text.txt --out a")
    run(capsys, "quantize m --transform smoothquant:n8 --rules w8a8.toml --calib text.txt --out b")
    a, b = load_hf("a"), load_hf("b")
    assert (np.asarray(a.logits(TOKENS)) == np.asarray(b.logits(TOKENS))).all()
    evaluation = run(capsys, "eval a --text text.txt --against m --convention gptq-32")
    assert 1e-6 < evaluation["kl_mean"] < 0.3  # random weights, large logits


@pytest.mark.parametrize(
    "command, message",
    [
        ("transform m --name spinquant:steps2.5 --out x", "unknown key of transform 'spinquant:steps2.5' 'steps2.5'"),
        ("transform m --name quarot:dct:blocks --out x", "dct and blocks (allowed: one of dct, blocks)"),
        ("transform m --name spinquant:blocks:dct --calib text.txt --out x", "blocks and dct (allowed: one of"),
        ("transform m --name quaro --out x", "unknown transform 'quaro'; did you mean 'quarot'"),
        ("transform m --name spinquant --out x", "transform spinquant without --calib"),
        ("transform m --name spinquant --calib none.txt --out x", "none.txt"),
        ("transform m --name spinquant:len64 --calib short.txt --out x", "rows of 64"),
        ("transform m --name quarot --format int4 --out x", "which does not learn"),
        ("transform m --name quarot --save x.npz --out x", "ends in .safetensors"),
        ("transform m --name lost.safetensors --out x", "cannot read the transform lost.safetensors"),
        ("transform m --name quarot --out m", "output m exists"),
        ("quantize m --transform quarot:r9 --format int4 --out x", "unknown key of transform"),
        ("quantize m --transform smoothquant --format int4 --out x", "smoothquant without --calib"),
    ],
)
def test_bad_input(model, capsys, tmp_path, command: str, message: str):
    assert message in refused(capsys, command)
    assert not (tmp_path / "x").exists()

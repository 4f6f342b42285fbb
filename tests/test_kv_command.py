"""Cache and activation formats from the command line, and what they cost on a real model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.export.open import open_model
from lowbit.formats.kv import KV_FORMATS
from lowbit.models.cache import with_caches
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from tests.shared import shared_path

CONFIG = ModelConfig("llama", 258, 32, 64, 1, 2, 1, 16, 128, tied=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kv")
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ByteTokenizer())
    save_hf(model, root / "m", dtype="bfloat16")
    save_hf(with_caches(model, "int4:g8", "int8"), root / "cached", dtype=None, packed=True)
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return root


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def run(capsys, *argv: str) -> dict:
    capsys.readouterr()
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main([*argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.slow
def test_generate_reports_the_bytes_of_its_cache(here, capsys):
    options = ["generate", "m", "--prompt", "ab", "--tokens", "20"]
    plain = run(capsys, *options)
    slots = plain["cache_positions"]
    assert slots == 64 and plain["cache_bytes_fp"] == 2 * 2 * slots * 16 and plain["cache_bytes"] == 4 * 2 * slots * 16
    small = run(
        capsys, *options, "--k-cache", "int4:g8:asym", "--v-cache", "fp8:w3", "--kv-rotate", "--act", "int8:token"
    )
    assert small["cache_bytes_fp"] == plain["cache_bytes_fp"]
    assert small["cache_bytes"] == slots * (8 + 2 * 2 + 1) + slots * (16 + 2) + 4 * 4 * 16
    kept = run(capsys, "generate", "cached", "--tokens", "20")
    assert kept["cache_bytes"] == slots * (8 + 2 * 2) + slots * (16 + 2)
    other = run(capsys, "generate", "cached", "--tokens", "20", "--kv", "int2")
    assert other["cache_bytes"] == 2 * slots * (4 + 2)


def test_eval_measures_the_model_with_them_and_the_reference_without(here, capsys):
    options = ["eval", "m", "--text", "text.txt", "--against", "m", "--convention", "gptq-64"]
    assert run(capsys, *options)["kl_mean"] < 1e-9
    kl = {kv: run(capsys, *options, "--kv", kv)["kl_mean"] for kv in ("int8", "int2:asym", "int2:asym:w48")}
    assert 0 < kl["int8"] < kl["int2:asym:w48"] < kl["int2:asym"]
    data = run(capsys, *options, "--act", "int4:token:r0.9", "--k-cache", "int4", "--kv-rotate")
    assert data["act"] == "int4:token:r0.9" and data["k_cache"] == "int4" and data["kv_rotate"] and data["kl_mean"] > 0


def test_formats_and_inspect_show_caches(here, capsys):
    caches = {row["name"]: row["bits"] for row in run(capsys, "formats")["caches"]}
    assert list(caches) == list(KV_FORMATS) and caches["int4:token:g64:asym"] == 4 + 20 / 64
    assert main(["formats"]) == 0 and "int2:channel:g32:asym:w128" in capsys.readouterr().out
    rows = {r["path"]: r for r in run(capsys, "inspect", "cached", "--stats")["tensors"]}
    site = rows["model.layers.0.self_attn.k_cache"]
    assert site["format"] == "int4:token:g8" and site["bytes"] == 0 and site["mean"] is None
    assert main(["inspect", "cached", "--stats"]) == 0 and "int4:token:g8" in capsys.readouterr().out


def test_estimate_lists_planned_caches(here, capsys):
    (here / "rules.toml").write_text("[[rule]]\nmatch = '.*_cache'\nformat = 'int4:g8'\n")
    table = run(capsys, "estimate", "m", "--format", "int8", "--rules", "rules.toml")["tensors"]
    cached = [row for row in table if row["site"].endswith("_cache")]
    assert len(cached) == 2 and {row["format"] for row in cached} == {"int4:token:g8"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kv", "int3:channel:g32:w100"], "window of 100 tokens (allowed: multiples of the group, 32)"),
        (["--kv", "int4:g32"], "cache format int4:token:g32: heads of 16 values (allowed: multiples of 32)"),
        (["--k-cache", "itn4"], "unknown cache format 'itn4'"),
        (["--kv-rotate"], "--kv-rotate without a cache format"),
        (["--act", "int8:tensor"], "stores its scale, which calibration gives"),
        (["--act", "int4:token:g64"], "multiples of 64"),
    ],
)
def test_refusals(here, capsys, options, message):
    for command in (["generate", "m"], ["eval", "m", "--text", "text.txt"]):
        assert message in refused(capsys, *command, *options)


@pytest.mark.slow
def test_real_model_loses_more_with_fewer_bits_and_less_with_a_window():
    """stories260K, heads of 8 values, on a text it knows: bits, rotation and window in the order of the papers."""
    model = open_model(shared_path("data/models/stories260K/stories260K.bin"))
    text = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_text()[2000:6000]
    tokens = np.asarray(model.tokenizer.encode(text)[:256]).reshape(1, 256)
    logp = jax.nn.log_softmax(model.logits(tokens))

    def kl(*formats) -> float:
        logq = jax.nn.log_softmax(with_caches(model, *formats).logits(tokens))
        return float((np.exp(logp) * (logp - logq)).sum(-1).mean())

    eight, four, two = kl("int8", "int8"), kl("int4:asym", "int4:asym"), kl("int2:asym", "int2:asym")
    assert 0 < eight < 0.05 * four and four < two and two > 0.2
    assert kl("int2:asym:w128", "int2:asym:w128") < 0.8 * two
    assert kl(None, "int4:asym") < 0.1 * four  # keys are the sensitive side: some of their channels stick out
    assert kl("int4:channel:g8:asym", "int4:asym") < 0.2 * four

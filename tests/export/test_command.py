"""`lowbit export`: what only the command adds, the options for single tensors."""

import json

import pytest

from lowbit.cli import main
from lowbit.export.gguf_file import parse
from lowbit.models.hf import save_hf
from tests.export.small_models import byte_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hf(byte_model(num_layers=2), "m")
    return tmp_path


def test_overrides_and_embedding(here, capsys):
    options = ["--override", r".*\.1\.mlp\.down_proj=f16", "--override", ".*down_proj=Q8_0", "--embedding", "q8_0"]
    assert main(["export", "m", "--to", "gguf:Q4_0", *options, "--out", "m.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["types"] == {"F32": 5, "Q8_0": 3, "Q4_0": 12, "F16": 1}
    types = {n: t.type.name for n, t in parse(here / "m.gguf").tensors.items()}
    assert types["blk.1.ffn_down.weight"] == "F16"  # the first match wins
    assert types["blk.0.ffn_down.weight"] == types["token_embd.weight"] == types["output.weight"] == "Q8_0"


BAD = [
    (["--override", "down_proj"], "--override 'down_proj' (allowed: REGEX=TYPE"),
    (["--override", ".*down_proj=Q9_0"], "unknown GGUF type 'Q9_0'"),
    (["--override", "(=F16"], "override '(' is no regex"),
    (["--override", "nothing=F16"], "override 'nothing' matches no tensor"),
    (["--embedding", "Q9_0"], "unknown GGUF type 'Q9_0'"),
    (["--to", "hf", "--embedding", "Q8_0"], "--override or --embedding with target hf"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options, message, here, capsys):
    assert main(["export", "m", "--to", "gguf:F32", *options, "--out", "out"]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
    assert not (here / "out").exists()

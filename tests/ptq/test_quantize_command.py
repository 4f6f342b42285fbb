"""`lowbit quantize` and `lowbit export`: folders, bundled names and hub ids go tensor by tensor."""

import json

import pytest

from lowbit.cli import main
from lowbit.commands import common, quantize
from lowbit.evaluate.size import file_bytes, folder_sizes, sizes
from lowbit.models import hf
from lowbit.models.hf import load_hf, save_hf
from lowbit.plan import Plan, Rule
from lowbit.ptq.rtn import quantize_dir
from tests.export.small_models import byte_model, model


@pytest.fixture
def nothing_whole(monkeypatch):
    """Loading a whole model fails."""
    for module in (common, quantize):
        monkeypatch.setattr(module, "load", lambda source: pytest.fail(f"{source} was loaded whole"))
    monkeypatch.setattr(hf, "load_hf", lambda folder: pytest.fail(f"{folder} was loaded whole"))


def test_bundled_name_streams(nothing_whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", "lowbit-base", "--format", "q4_0", "--out", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["file_bytes"] == file_bytes(out) > data["stored_bytes"]
    assert data["bits_per_weight_quantized"] == 4.5 and data["params"] == hf.load_config(out).num_params
    assert (out / "tokenizer.json").exists()


def test_hub_id_streams(nothing_whole, tmp_path, monkeypatch, capsys):
    """The snapshot that a hub id resolves to is the folder that is read."""
    save_hf(byte_model(num_layers=1), tmp_path / "snapshot")
    monkeypatch.setattr("lowbit.export.open.resolve", lambda source: tmp_path / "snapshot")
    assert main(["quantize", "owner/name", "--format", "q8_0", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight_quantized"] == 8.5
    monkeypatch.setattr("lowbit.export.api.KL_BYTES", 0)
    seen = []
    monkeypatch.setattr("lowbit.export.api.open_sources", lambda source, *a, **k: seen.append(source) or stop())
    assert main(["export", "owner/name", "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 2
    assert seen == [tmp_path / "snapshot"]


def stop():
    from lowbit.errors import InputError

    raise InputError("seen")


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_of_a_folder(tied, tmp_path):
    """From headers, the same as of the loaded parameters."""
    save_hf(model(tied=tied), tmp_path / "m")
    rules = (Rule(r".*down_proj", "int4:g64:asym"), Rule(r".*up_proj:in", "int8:token"), Rule(r".*q_proj", "bf16"))
    quantize_dir(tmp_path / "m", Plan(rules, "ternary:g256"), tmp_path / "q")
    for folder in (tmp_path / "m", tmp_path / "q"):
        assert folder_sizes(folder) == sizes(load_hf(folder).params)

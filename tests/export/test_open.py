"""`open_model` on everything it accepts, and its refusals."""

import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.export.gguf import write_gguf
from lowbit.export.hf import export_hf
from lowbit.export.open import open_model
from lowbit.models.llama2c import save_llama2c
from tests.export.small_models import byte_model, config, packed

TOKENS = np.arange(20)[None]


def write(kind: str, tmp_path):
    m = byte_model(num_layers=1, norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,))
    q = packed(m, "q8_0")
    match kind:
        case "hf":
            export_hf(m, tmp_path / "m")
        case "packed":
            export_hf(q, tmp_path / "m", packed=True)
        case "run":
            export_hf(q, tmp_path / "m" / "model", packed=True)
        case "safetensors":
            export_hf(m, tmp_path / "m")
            return m, tmp_path / "m" / "model.safetensors"
        case "gguf":
            write_gguf(q, tmp_path / "m.gguf")
            return q, tmp_path / "m.gguf"
        case "llama2c":
            save_llama2c(m, tmp_path / "m.bin")
            return m, tmp_path / "m.bin"
    return (m if kind == "hf" else q), tmp_path / "m"


@pytest.mark.parametrize("kind", ["hf", "packed", "run", "safetensors", "gguf", "llama2c"])
def test_opens(kind, tmp_path):
    m, path = write(kind, tmp_path)
    for source in (path, str(path)):
        back = open_model(source)
    assert back.config.hidden_size == config("llama").hidden_size
    np.testing.assert_array_equal(np.asarray(back.logits(TOKENS)), np.asarray(m.logits(TOKENS)))


def test_a_run_directory_remembers_its_own_name(tmp_path):
    _, path = write("run", tmp_path)
    assert open_model(path).source == str(path)


def test_the_package_s_own_model():
    m = open_model("lowbit-base")
    assert m.tokenizer.vocab_size <= m.config.vocab_size


def test_refusals(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "x.gguf").write_text("hello")
    (tmp_path / "lonely.safetensors").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    (tmp_path / "run/config.json").write_text("{}")
    for source, message in [
        (tmp_path / "absent", "no model '.*absent' .allowed: a folder with config.json"),
        (tmp_path / "empty", "is no model: it has no config.json and no model/ .it holds nothing"),
        (tmp_path / "notes.txt", "notes.txt is no model file"),
        (tmp_path / "x.gguf", "is no GGUF file"),
        (tmp_path / "lonely.safetensors", "is no model: it has no config.json"),
        ("no-such-model", "no model 'no-such-model'"),
        (tmp_path / "run", "run directory .*run has no finished model, .* continues it with --resume"),
    ]:
        with pytest.raises(InputError, match=message) as e:
            open_model(source)
        assert "\n" not in str(e.value)

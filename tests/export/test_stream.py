"""Export of a folder: the bytes of the export from memory, one tensor at a time, compared with what the file holds."""

import gc
import time
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.export import api, verify
from lowbit.export.api import ExportMismatch, export
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_file import parse
from lowbit.export.hf import export_hf
from lowbit.formats.activation import get_act
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.shards import Shards
from lowbit.plan import Plan, Rule
from lowbit.ptq.rtn import quantize_dir
from tests.export.small_models import byte_model, model, packed


@pytest.fixture
def folder(tmp_path):
    """A plain bf16 folder in several shards."""
    hf.save_hf(byte_model(dtype=jnp.bfloat16), tmp_path / "m", dtype=None, max_shard_bytes=300_000)
    return tmp_path / "m"


def quantized(folder, plan):
    out = folder.with_name("packed")
    quantize_dir(folder, plan if isinstance(plan, Plan) else Plan.uniform(plan), out)
    return out


@pytest.mark.parametrize("format", [None, "q4_0", "int2:g64", "int3:g32", "ternary:g256", "int8"])
def test_same_bytes_as_from_memory(format, folder, tmp_path):
    src = folder if format is None else quantized(folder, format)
    m = hf.load_hf(src)
    for to in ("auto", "Q8_0", "F16"):
        a, b = write_gguf(src, tmp_path / "a" / "m.gguf", to), write_gguf(m, tmp_path / "b" / "m.gguf", to)
        assert (a.types, a.fresh, a.rounded, a.notes) == (b.types, b.fresh, b.rounded, b.notes)
        assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_mixed_formats_and_float_formats(folder, tmp_path):
    """A plan's bf16 weights, and levels that the usual type of their format cannot hold."""
    rules = (Rule(r".*down_proj", "bf16"), Rule(r".*up_proj", "int4:g32:asym"))
    src = quantized(folder, Plan(rules, "q4_0"))
    report = export(src, "gguf", tmp_path / "m.gguf")
    assert report["kl_mean"] == 0.0 and set(report["types"]) == {"F32", "BF16", "Q4_0", "Q5_0"}


@pytest.mark.parametrize("to", ["hf", "hf:float16", "packed"])
@pytest.mark.parametrize("format", [None, "q4_0"])
def test_folders_to_folders(to, format, folder, tmp_path):
    src = folder if format is None else quantized(folder, format)
    report = export(src, to, tmp_path / "a", kl_bytes=0)
    assert report["weights"] == hf.load_config(src).num_params
    assert bool(report["rounded"]) == (to == "hf:float16")
    export_hf(hf.load_hf(src), tmp_path / "b", to == "packed", to[3:] or None if to != "packed" else None)
    names = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_folder_over_itself(folder):
    src = quantized(folder, "q4_0")
    report = export(src, "hf", src)
    assert report["kl_mean"] == 0.0 and set(hf.stored_kinds(src).values()) == {"float32"}


@pytest.mark.parametrize(
    "to, tensor, format",
    [
        ("gguf:Q4_0", "blk.1.ffn_up.weight", "q4_0"),
        ("gguf:Q2_0", "blk.1.attn_k.weight", "q2_0"),
        ("gguf:BF16", "output.weight", None),
        ("gguf:BF16", "output_norm.weight", None),
    ],
)
def test_a_flipped_bit_is_found(to, tensor, format, folder, tmp_path, monkeypatch):
    src, out, write = quantized(folder, format) if format else folder, tmp_path / "m.gguf", api.write_sources

    def damaged(*args, **kwargs):
        report = write(*args, **kwargs)
        info = parse(out).tensors[tensor]
        data = bytearray(out.read_bytes())
        data[info.offset + info.nbytes - 1] ^= 0x04
        out.write_bytes(data)
        return report

    monkeypatch.setattr(api, "write_sources", damaged)
    monkeypatch.setattr(verify, "PART", 4096)  # several parts: the bit lies in the last
    with pytest.raises(ExportMismatch, match="1 weights of .*(up|k)_proj|1 weights of (lm_head|model.norm) differ"):
        export(src, to, out, kl_bytes=0)
    assert out.exists()


@pytest.mark.parametrize("format, to", [(None, "gguf:Q4_0"), (None, "hf"), ("q4_0", "gguf"), ("q4_0", "packed")])
def test_one_tensor_at_a_time(format, to, folder, tmp_path, monkeypatch):
    """Every array that is read from the source is gone before the next parameter's is read."""
    src = folder if format is None else quantized(folder, format)
    read, kept, others, count = Shards.read, [], set(), 0

    def watched(self, name):
        nonlocal count
        path, count = name.rpartition(".")[0], count + 1
        if any(ref() is not None and p != path for ref, p in kept):
            gc.collect()
            time.sleep(0.1)  # jax may still be about to let go of an input
            others.update(p for ref, p in kept if ref() is not None and p != path)
        a = read(self, name).view(Watched)
        kept.append((weakref.ref(a), path))
        return a

    monkeypatch.setattr(Shards, "read", watched)
    monkeypatch.setattr(api, "load_hf", lambda folder: pytest.fail("the whole model was loaded"))
    monkeypatch.setattr(api, "read_gguf", lambda path: pytest.fail("the whole file was loaded"))
    report = export(src, to, tmp_path / "out", kl_bytes=0)
    assert report["kl_mean"] is None and "KL not computed" in report["notes"][-1]
    assert report["weights"] == hf.load_config(src).num_params
    assert count >= 2 * len(hf.load_config(src).shapes())  # for writing and for comparing
    assert not others


class Watched(np.ndarray):
    """An array with weak references of its own."""


@pytest.mark.parametrize("name", ["gemma3", "llama-tied-bias", "qwen3"])
def test_parts_of_other_families(name, tmp_path, monkeypatch):
    """Rows in parts: halves of Q and K heads, norms stored as 1 + w, biases."""
    m = packed(model(name), "tq2_0")
    hf.save_hf(m, tmp_path / "m", dtype=None, packed=True)
    monkeypatch.setattr(verify, "PART", 1)
    assert export(tmp_path / "m", "gguf", tmp_path / "m.gguf", kl_bytes=0)["weights"] == m.config.num_params


def test_kl_rule(folder, tmp_path):
    size = 4 * hf.load_config(folder).num_params
    assert export(folder, "gguf", tmp_path / "a.gguf", kl_bytes=size)["kl_mean"] == 0.0
    report = export(folder, "gguf", tmp_path / "a.gguf", kl_bytes=size - 1)
    assert report["kl_mean"] is report["kl_max"] is None
    assert report["notes"] == [f"KL not computed for {size:,} bytes in float32 (only up to {size - 1:,})"]
    assert export(hf.load_hf(folder), "gguf", tmp_path / "a.gguf", kl_bytes=0)["kl_mean"] == 0.0  # is in memory anyway


@pytest.mark.parametrize("to", ["gguf:Q8_0", "hf"])
def test_activation_formats(to, tmp_path):
    m = packed(model(num_layers=1), "q8_0")
    up = m.params["model"]["layers"]["0"]["mlp"]
    up["up_proj"] = PreparedInput(up["up_proj"], get_act("int8:token"))
    hf.save_hf(m, tmp_path / "m", dtype=None, packed=True)
    with pytest.raises(InputError, match="up_proj quantizes its input"):
        export(tmp_path / "m", to, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert export(tmp_path / "m", to, tmp_path / "out", drop_activations=True)["kl_mean"] == 0.0


@pytest.mark.parametrize("format, type, block", [("int8", "auto", "Q8_0's block of 32"), ("q8_0", "TQ2_0", "of 256")])
def test_rows_of_no_whole_blocks(format, type, block, tmp_path, monkeypatch):
    """What does not fit by its shape is refused before any weight is loaded."""
    m = model(num_layers=2, intermediate_size=344 if format == "int8" else 320)
    hf.save_hf(m, tmp_path / "m")
    src = quantized(tmp_path / "m", format)
    monkeypatch.setattr(Shards, "read", lambda self, name: pytest.fail("a weight was loaded"))
    with pytest.raises(
        InputError, match=rf"layers.0.mlp.down_proj .*layers.1.mlp.down_proj .*no multiple of .*{block}"
    ):
        write_gguf(src, tmp_path / "m.gguf", type)
    assert not list(tmp_path.glob("*.gguf"))

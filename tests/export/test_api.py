"""`export`: what it reports, that it compares, and that a file which differs is an error."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.export import api, gguf_arch, gguf_read, gguf_types, translate
from lowbit.export.api import ExportMismatch, export
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_file import parse
from lowbit.export.gguf_read import read_gguf
from lowbit.formats.activation import get_act
from lowbit.formats.fake_quant import PreparedInput
from tests.export.small_models import CASES, byte_model, model, packed


def out(tmp_path, to):
    return tmp_path / ("m.gguf" if to.startswith("gguf") else "m")


@pytest.mark.parametrize("to", ["gguf", "gguf:Q4_0", "gguf:q8_0", "gguf:F32", "hf", "hf:float32", "packed"])
def test_exact_targets(to, tmp_path):
    m = packed(byte_model(num_layers=1), "q4_0")
    r = export(m, to, out(tmp_path, to))
    assert r["weights"] == m.config.num_params and r["kl_mean"] == 0.0 and not r["fresh"] and not r["rounded"]
    files = [out(tmp_path, to)] if "gguf" in to else list(out(tmp_path, to).glob("*.safetensors"))
    assert r["bytes"] == sum(f.stat().st_size for f in files) > 0


def test_rounding_is_counted_and_priced(tmp_path):
    m = byte_model(num_layers=1)
    r = export(m, "gguf:Q4_0", tmp_path / "m.gguf")
    assert len(r["fresh"]) == 7 and r["types"] == {"F32": 5, "Q4_0": 7} and 1e-4 < r["kl_mean"] < 1
    r = export(m, "gguf:F16", tmp_path / "m.gguf")
    assert sum(r["rounded"].values()) > 1e5 and 0 < r["kl_mean"] < 1e-4
    r = export(m, "hf:bfloat16", tmp_path / "hf")
    assert sum(r["rounded"].values()) > 1e5 and 0 < r["kl_mean"] < 1e-2


def test_bf16_packed_weights_compare_before_the_cast(tmp_path):
    m = packed(model(num_layers=1, dtype=jnp.bfloat16), "q4_0")
    assert export(m, "gguf:Q4_0", tmp_path / "m.gguf")["kl_mean"] == 0.0


@pytest.mark.parametrize("name", [pytest.param("gemma2", marks=pytest.mark.slow), "qwen3"])
def test_other_families(name, tmp_path):
    m = packed(byte_model(name), "tq2_0")
    assert export(m, "gguf:TQ2_0", tmp_path / "m.gguf")["weights"] == m.config.num_params


def test_a_file_that_differs_is_an_error_and_stays(tmp_path, monkeypatch):
    m, path = packed(model(num_layers=1), "q4_0"), tmp_path / "m.gguf"
    write = api.write_sources

    def damaged(*args, **kwargs):
        report = write(*args, **kwargs)
        info = parse(path).tensors["blk.0.ffn_up.weight"]
        with open(path, "rb+") as f:
            f.seek(info.offset + 5)
            byte = f.read(1)[0]
            f.seek(info.offset + 5)
            f.write(bytes([byte ^ 0x10]))
        return report

    monkeypatch.setattr(api, "write_sources", damaged)
    with pytest.raises(ExportMismatch, match="1 weights of model.layers.0.mlp.up_proj differ"):
        export(m, "gguf:Q4_0", path)
    assert path.exists()


def test_a_wrong_row_order_is_an_error(tmp_path, monkeypatch):
    """The comparison sees a missing permutation of Q and K."""
    m = packed(model(num_layers=1), "q4_0")
    monkeypatch.setattr("lowbit.export.gguf.arch.to_file_rows", lambda x, path, c: x)
    with pytest.raises(ExportMismatch, match="q_proj differ"):
        export(m, "gguf:Q4_0", tmp_path / "m.gguf")


def test_a_row_order_wrong_both_ways_is_an_error(tmp_path, monkeypatch):
    """The comparison does not undo the writer's order with the reader's own inverse of it."""
    m = packed(model(num_layers=1), "q4_0")
    for way in ("to_file_rows", "from_file_rows"):
        monkeypatch.setattr(gguf_arch, way, lambda x, path, c: x)
    with pytest.raises(ExportMismatch, match="q_proj differ"):
        export(m, "gguf:Q4_0", tmp_path / "m.gguf")


SLOW = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "TQ1_0")
QUANTIZED = [
    pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n, t in gguf_types.TYPES.items() if t.quantized
]


@pytest.mark.parametrize("type", QUANTIZED)
def test_codes_wrong_both_ways_are_an_error(type, tmp_path, monkeypatch):
    """A layout that packs and unpacks consistently, but not as ggml does: our own reader would not notice."""
    m = packed(model(num_layers=1), type.lower() + ":absmax" * type.endswith("_K"))
    pack, unpack = gguf_types.blocks, gguf_types.unblock

    def backwards(f):
        return f._replace(levels=f.levels[:, ::-1])

    monkeypatch.setattr(translate, "blocks", lambda t, f: pack(t, backwards(f)))
    monkeypatch.setattr(gguf_read, "unblock", lambda t, data: backwards(unpack(t, data)))
    write_gguf(m, tmp_path / "m.gguf", type)
    path = "model.layers.0.mlp.up_proj"
    ours, wanted = (np.asarray(trees.get(x.params, path).decode()) for x in (read_gguf(tmp_path / "m.gguf"), m))
    np.testing.assert_array_equal(ours, wanted)
    with pytest.raises(ExportMismatch, match="proj differ"):
        export(m, f"gguf:{type}", tmp_path / "m.gguf")


def test_names_wrong_both_ways_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(gguf_arch._LAYER, "mlp.gate_proj", "ffn_up")
    monkeypatch.setitem(gguf_arch._LAYER, "mlp.up_proj", "ffn_gate")
    with pytest.raises(ExportMismatch, match="gate_proj differ"):
        export(model(num_layers=1), "gguf:F32", tmp_path / "m.gguf")


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_every_family_is_found(name, tmp_path):
    m = model(name)
    assert export(m, "gguf:F32", tmp_path / "m.gguf")["weights"] == m.config.num_params


def test_a_file_that_the_library_cannot_read_is_an_error(tmp_path, monkeypatch):
    write, path = api.write_sources, tmp_path / "m.gguf"

    def short(*args, **kwargs):
        report = write(*args, **kwargs)
        path.write_bytes(path.read_bytes()[:-5000])
        return report

    monkeypatch.setattr(api, "write_sources", short)
    with pytest.raises(ExportMismatch, match="library cannot read it"):
        export(model(num_layers=1), "gguf:F32", path)


def test_activation_formats(tmp_path):
    m = packed(model(num_layers=1), "q8_0")
    params = trees.map_leaves(lambda p, w: PreparedInput(w, get_act("int8:token")) if "up_proj" in p else w, m.params)
    m = m.replace(params=params)
    for to in ("gguf", "hf"):
        with pytest.raises(InputError, match="quantizes its input"):
            export(m, to, out(tmp_path, to))
        assert export(m, to, out(tmp_path, to), drop_activations=True)["kl_mean"] == 0.0
    export(m, "packed", tmp_path / "p")


def test_unknown_targets(tmp_path):
    for to, message in [
        ("ggfu:Q4_0", "unknown export target 'ggfu:Q4_0'; did you mean 'gguf:Q4_0'"),
        ("gguf:Q9_0", "unknown GGUF type 'Q9_0'"),
        ("hf:int8", "unknown dtype of export target hf 'int8'"),
        ("packed:x", "unknown export target"),
    ]:
        with pytest.raises(InputError, match=message):
            export(model(num_layers=1), to, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert "gguf:TQ2_0" in api.targets()


def test_kl_of_a_damaged_model_is_seen():
    m = model(num_layers=1)
    other = m.replace(params=trees.map_leaves(lambda p, w: w * 1.05 if "up_proj" in p else w, m.params))
    mean, worst = api._divergence(m, other, False)
    assert api.KL_LIMIT < mean < worst
    assert np.allclose(api._divergence(m, m, False), 0)

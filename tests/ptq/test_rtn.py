"""Round to nearest in memory and over folders: the same codes, resumable, and never a half-written result."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_read import read_gguf
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.hf import load_hf, save_hf
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from tests.export.small_models import byte_model, model

PLAN = Plan((Rule(r".*\.0\.mlp\.down_proj", "int8"),), "q4_0")


@pytest.fixture
def src(tmp_path):
    save_hf(byte_model(dtype=jnp.bfloat16), tmp_path / "src", dtype=None, max_shard_bytes=300_000)
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 2
    return tmp_path / "src"


def same(a, b):
    for (p, x), (q, y) in zip(trees.items(a), trees.items(b), strict=True):
        assert p == q and type(x) is type(y)
        if isinstance(x, QTensor):
            assert x.format == y.format and x.dtype == y.dtype
            for k in x.arrays:
                np.testing.assert_array_equal(np.asarray(x.arrays[k]), np.asarray(y.arrays[k]), err_msg=p)
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=p)


def test_encode_is_the_format_s_own():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    for name in ("q4_0", "int4:g32:asym", "ternary:tensor"):
        fmt = formats.get(name)
        a, b = rtn.encode(fmt, w), fmt.encode(w.astype(jnp.float32))
        assert a.dtype == "float32"
        for k in a.arrays:
            np.testing.assert_array_equal(np.asarray(a.arrays[k]), np.asarray(b.arrays[k]))
    with pytest.raises(InputError, match="must be finite"):
        rtn.encode(formats.get("q4_0"), w.at[1, 3].set(jnp.nan))
    with pytest.raises(InputError, match="multiple of 32"):
        rtn.encode(formats.get("q4_0"), w[:, :43])


def test_quantize_assigns_formats_and_inputs():
    m = model()
    plan = Plan((*PLAN.rules, Rule(r".*\.1\.mlp\.up_proj:in", "int8:token")), "q4_0")
    params = rtn.quantize(m.params, plan.resolve(m.config.shapes()))
    flat = dict(trees.items(params))
    assert flat["model.layers.0.mlp.down_proj"].format.name == "int8:channel"
    assert isinstance(flat["model.layers.1.mlp.up_proj"], PreparedInput)
    assert sum(isinstance(x, QTensor | PreparedInput) for x in flat.values()) == 14
    assert flat["model.embed_tokens"] is m.params["model"]["embed_tokens"]
    with pytest.raises(InputError, match="down_proj is quantized already"):
        rtn.quantize(params, {"model.layers.0.mlp.down_proj": formats.get("q4_0")})
    with pytest.raises(InputError, match="format for 'model.nothing'"):
        rtn.quantize(m.params, {"model.nothing": formats.get("q4_0")})


def test_folder_equals_memory(src, tmp_path):
    seen = []
    rtn.quantize_dir(src, PLAN, tmp_path / "out", lambda *a: seen.append(a))
    m = load_hf(src)
    wanted = rtn.quantize(m.params, PLAN.resolve(m.config.shapes()))
    back = load_hf(tmp_path / "out")
    same(back.params, wanted)
    assert seen == [(i, 5) for i in range(1, 6)]  # embedding, two layers, norm, head
    assert back.tokenizer.encode("Hello") == m.tokenizer.encode("Hello")
    assert not list(tmp_path.glob(".*"))


def test_folder_is_what_save_hf_writes(src, tmp_path):
    rtn.quantize_dir(src, PLAN, tmp_path / "a")
    m = load_hf(src)
    m = m.replace(params=rtn.quantize(m.params, PLAN.resolve(m.config.shapes())))
    save_hf(m, tmp_path / "b", dtype=None, packed=True)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tmp_path / "b" / "config.json").read_text()
    )


class Interrupted(Exception):
    pass


def interrupt_at(n):
    def progress(done, total):
        if done == n:
            raise Interrupted

    return progress


def test_resumes_behind_the_last_whole_shard(src, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        rtn.quantize_dir(src, PLAN, tmp_path / "out", interrupt_at(2))
    assert not (tmp_path / "out").exists()
    done = sorted(tmp_path.glob(".out.partial/*/*/*.safetensors"))
    times = [p.stat().st_mtime_ns for p in done]
    assert len(done) == 2
    quantized = []
    monkeypatch.setattr(rtn, "encode", lambda fmt, w, f=rtn.encode: quantized.append(w.shape) or f(fmt, w))
    inodes = [p.stat().st_ino for p in done]
    rtn.quantize_dir(src, PLAN, tmp_path / "out")
    assert len(quantized) == 7  # the second layer's only
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [p.stat().st_ino for p in shards[:2]] == inodes and [p.stat().st_mtime_ns for p in shards[:2]] == times
    m = load_hf(src)
    same(load_hf(tmp_path / "out").params, rtn.quantize(m.params, PLAN.resolve(m.config.shapes())))


@pytest.mark.parametrize("change", ["plan", "source"])
def test_another_plan_or_source_starts_anew(change, src, tmp_path):
    with pytest.raises(Interrupted):
        rtn.quantize_dir(src, PLAN, tmp_path / "out", interrupt_at(3))
    plan = PLAN
    if change == "plan":
        plan = Plan.uniform("q8_0")
    else:
        save_hf(byte_model(dtype=jnp.bfloat16, seed=1), src, dtype=None)
    rtn.quantize_dir(src, plan, tmp_path / "out")
    m = load_hf(src)
    same(load_hf(tmp_path / "out").params, rtn.quantize(m.params, plan.resolve(m.config.shapes())))
    assert not list(tmp_path.glob(".*"))


def test_bad_source_leaves_no_result(src, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    shard = sorted(src.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-2:] = np.array([np.nan], ml_dtypes.bfloat16).tobytes()
    shard.write_bytes(data)
    with pytest.raises(InputError, match="NaN or infinite"):
        rtn.quantize_dir(src, PLAN, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    with pytest.raises(InputError, match="NaN or infinite"):
        write_gguf(src, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("plan", [Plan((Rule(r".*\.0\.mlp\.down_proj", "q8_0"),), "q4_0"), Plan.uniform("int2:g64")])
def test_quantized_and_exported_folder_equals_memory(plan, src, tmp_path):
    """The two verbs one after the other, tensor by tensor, against rounding in memory."""
    rtn.quantize_dir(src, plan, tmp_path / "packed")
    report = write_gguf(tmp_path / "packed", tmp_path / "m.gguf")
    names = {f.name.split(":")[0].upper() for f in plan.resolve(load_hf(src).config.shapes()).values()}
    assert set(report.types.values()) == {"F32", "BF16"} | {"Q2_0" if n == "INT2" else n for n in names}
    assert not report.fresh
    m = load_hf(src)
    wanted = rtn.quantize(m.params, plan.resolve(m.config.shapes()))
    back = read_gguf(tmp_path / "m.gguf")
    for (p, x), (_, y) in zip(trees.items(wanted), trees.items(back.params), strict=True):
        a, b = (np.asarray(z.decode() if isinstance(z, QTensor) else z, np.float32) for z in (x, y))
        np.testing.assert_array_equal(a, b, err_msg=p)


def test_folder_that_does_not_fit_a_type(src, tmp_path):
    rtn.quantize_dir(src, Plan.uniform("int8"), tmp_path / "packed")
    with pytest.raises(InputError, match="cannot write model.layers.0.self_attn.q_proj .*Q4_0"):
        write_gguf(tmp_path / "packed", tmp_path / "m.gguf", "Q4_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "src"]

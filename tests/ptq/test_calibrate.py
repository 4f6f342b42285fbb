"""Calibration block by block equals what the whole model sees; the solver over models and folders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg import online
from lowbit.models import decoder
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.llama2c import load_llama2c
from lowbit.plan import Plan, Rule
from lowbit.ptq import base, calibrate, gptq, rtn
from lowbit.ptq.calibrate import Stream, model_statistics, readers_of, tokenize
from tests.export.small_models import byte_model
from tests.ptq.test_rtn import Interrupted, interrupt_at, same
from tests.shared import shared_path

TEXT = ["The quick brown fox jumps over the lazy dog. " * 8, "Pack my box with five dozen liquor jugs! " * 8]
SMALL = {"rows": 3, "length": 64, "batch": 2}
PLAN = Plan.uniform("int4:g64")


def tiny(**changes):
    """Square linears, which share their programs, unless changed."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_kv_heads": 4}
    return byte_model(**(shape | changes))


def reference(m, tokens):
    """`{path: inputs [tokens, I] in float64}` of every linear, by running the blocks on all rows at once."""
    x, out = decoder.embed(m.params, jnp.asarray(tokens), m.config, jnp.float32), {}
    for i in range(m.config.num_layers):
        layer = m.params["model"]["layers"][str(i)]
        x, inputs = decoder.block(m.config, layer, x, jnp.asarray(i))
        for name, path in calibrate.linears(m.config).items():
            a = np.asarray(inputs[name], np.float64)
            out[f"model.layers.{i}.{path}"] = a.reshape(-1, a.shape[-1])
    return out


def test_rows_are_drawn_from_the_text():
    m = tiny()
    rows = tokenize(TEXT, m.tokenizer, 3, 64)
    flat = sum((m.tokenizer.encode(t) + [257] for t in TEXT), [])
    there = np.asarray(flat[: len(flat) // 64 * 64]).reshape(-1, 64)
    found = [int(np.flatnonzero((there == r).all(1))[0]) for r in rows]
    assert len(set(found)) == 3
    np.testing.assert_array_equal(rows, tokenize(TEXT, m.tokenizer, 3, 64))
    assert any((rows != tokenize(TEXT, m.tokenizer, 3, 64, seed)).any() for seed in (1, 2))
    with pytest.raises(InputError, match=rf"calibration text has {len(flat)} tokens.*needed: 6400 tokens for 100 rows"):
        tokenize(TEXT, m.tokenizer, 100, 64)
    with pytest.raises(InputError, match="without tokenizer"):
        tokenize(TEXT, None, 1, 64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hessians_are_those_of_the_whole_model(dtype):
    m = tiny()
    tokens = tokenize(TEXT, m.tokenizer, 3, 64)
    wanted, stream = reference(m, tokens), Stream(m.config, tokens, 2)
    stream.start(m.params["model"]["embed_tokens"])
    for i in range(2):
        layer = calibrate.working(m.params["model"]["layers"][str(i)])
        names = calibrate.linears(m.config)
        for name, h in stream.hessians(layer, i, tuple(names), dtype).items():
            x = wanted[f"model.layers.{i}.{names[name]}"]
            assert h.dtype == dtype
            np.testing.assert_allclose(h, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(h).max())
        stream.advance(layer, i)


def test_statistics_are_those_of_the_whole_model():
    m = tiny()
    wanted = reference(m, tokenize(TEXT, m.tokenizer, 3, 64))
    found = model_statistics(m, TEXT, rows=3, length=64)
    assert found.keys() == wanted.keys() and len(found) == 14
    for path, s in found.items():
        x = wanted[path]
        np.testing.assert_allclose(s.absmax_I, np.abs(x).max(0), rtol=1e-5)
        np.testing.assert_allclose(s.low_I, x.min(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(s.mean_square_I, (x**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(s.absmean_I, np.abs(x).mean(0), rtol=1e-4)


def test_what_is_not_finite_is_refused_by_name():
    m = tiny()
    layer = m.params["model"]["layers"]["1"]
    huge = {
        **layer,
        "mlp": {**layer["mlp"], "up_proj": layer["mlp"]["up_proj"] * 1e30, "gate_proj": jnp.full((64, 64), 1e30)},
    }
    m.params["model"]["layers"] = {**m.params["model"]["layers"], "1": huge}
    try:
        with pytest.raises(InputError, match=r"input of down_proj in model\.layers\.1 is not finite"):
            model_statistics(m, TEXT, rows=3, length=64)
        with pytest.raises(InputError, match=r"input of down_proj in model\.layers\.1 is not finite"):
            gptq.quantize(m, {"model.layers.1.mlp.down_proj": formats.get("int4:g64")}, TEXT, **SMALL)
    finally:
        m.params["model"]["layers"] = {**m.params["model"]["layers"], "1": layer}
    with pytest.raises(InputError, match=r"calibration length 129 \(the model's max_position_embeddings is 128\)"):
        model_statistics(m, TEXT, rows=1, length=129)


def test_a_layer_is_solved_through_what_is_quantized(monkeypatch):
    """The Hessian of `down_proj` in layer 1 is that of inputs which come through everything before it, packed."""
    m, seen = tiny(), {}
    solve = gptq.gptq

    def spy(w, h, fmt, **options):
        seen[options["name"]] = np.asarray(h)
        return solve(w, h, fmt, **options)

    monkeypatch.setattr(gptq, "gptq", spy)
    params = gptq.quantize(m, PLAN.resolve(m.config.shapes()), TEXT, **SMALL)
    wanted = reference(m.replace(params=params), tokenize(TEXT, m.tokenizer, 3, 64))
    assert len(seen) == 14
    for path, h in seen.items():
        x = wanted[path]
        np.testing.assert_allclose(h, 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4 * np.abs(h).max(), err_msg=path)


@pytest.mark.slow
def test_linears_that_see_the_same_share_a_hessian(monkeypatch):
    m, calls = tiny(num_layers=1), []
    hessians = Stream.hessians
    monkeypatch.setattr(
        Stream, "hessians", lambda s, l, i, names, d: calls.append(names) or hessians(s, l, i, names, d)
    )
    gptq.quantize(m, PLAN.resolve(m.config.shapes()), TEXT, **SMALL)
    assert calls == [("q_proj",), ("o_proj",), ("gate_proj",), ("down_proj",)]
    calls.clear()
    attn = m.params["model"]["layers"]["0"]["self_attn"]
    rotated = {**attn, "k_proj": PreparedInput(attn["k_proj"], op=online.get("hadamard:64"))}
    layer = {**m.params["model"]["layers"]["0"], "self_attn": rotated}
    params = {**m.params, "model": {**m.params["model"], "layers": {"0": layer}}}
    out = gptq.quantize(m.replace(params=params), PLAN.resolve(m.config.shapes()), TEXT, **SMALL)
    assert calls[0] == ("q_proj", "k_proj")
    leaf = trees.get(out, "model.layers.0.self_attn.k_proj")
    assert isinstance(leaf.w, QTensor) and leaf.op == online.get("hadamard:64")


@pytest.mark.slow
def test_inputs_and_what_lies_outside(capsys):
    m = tiny()
    rules = (
        Rule(".*down_proj:in", "int8:tensor"),
        Rule(".*up_proj:in", "int4:token"),
        Rule("lm_head", "int8"),
        Rule(r".*\.0\.mlp\.gate_proj", "bf16"),
    )
    assignment = Plan(rules, "int4:channel").resolve(m.config.shapes())
    params = gptq.quantize(m, assignment, TEXT, **SMALL)
    assert "lm_head is outside of the layers: rounded to nearest" in capsys.readouterr().err
    same({"lm_head": params["lm_head"]}, {"lm_head": rtn.encode(formats.get("int8"), m.params["lm_head"])})
    assert trees.get(params, "model.layers.0.mlp.gate_proj") is trees.get(m.params, "model.layers.0.mlp.gate_proj")
    down = trees.get(params, "model.layers.1.mlp.down_proj")
    inputs = reference(m.replace(params=params), tokenize(TEXT, m.tokenizer, 3, 64))["model.layers.0.mlp.down_proj"]
    assert down.act.name == "int8:tensor" and float(down.params["scale"]) > 0
    assert np.unique(inputs).size <= 256
    other = gptq.quantize(m, assignment, TEXT, inputs="quantized", **SMALL)
    with pytest.raises(AssertionError):
        same(
            {"w": trees.get(other, "model.layers.1.mlp.up_proj").w},
            {"w": trees.get(params, "model.layers.1.mlp.up_proj").w},
        )


# -- folders ----------------------------------------------------------------------------------------------------------


def leaves(tree):
    """As `same` compares: what is prepared, apart."""
    return {p: x.w if isinstance(x, PreparedInput) else x for p, x in trees.items(tree)}, {
        p: (x.act, x.op) for p, x in trees.items(tree) if isinstance(x, PreparedInput)
    }


@pytest.fixture
def src(tmp_path):
    """Two layers, one linear with an online transform that stores arrays."""
    m = tiny(dtype=jnp.bfloat16, intermediate_size=128, num_kv_heads=2)
    flat = dict(trees.items(m.params))
    path, rng = "model.layers.1.mlp.down_proj", np.random.default_rng(0)
    op = online.Kronecker(*(jnp.asarray(rng.standard_normal((n, n)), jnp.float32) for n in (8, 16)))
    flat[path] = PreparedInput(flat[path], op=op)
    save_hf(m.replace(params=trees.build(flat)), tmp_path / "src", dtype=None, packed=True)
    return tmp_path / "src"


def test_folder_equals_memory_and_resumes(src, tmp_path):
    plan = Plan((Rule(r".*\.1\.mlp\.down_proj:in", "int8:tensor"),), "int4:g32")
    m, seen = load_hf(src), []
    wanted = gptq.quantize(m, plan.resolve(m.config.shapes()), TEXT, **SMALL)
    gptq.quantize_dir(src, plan, tmp_path / "out", lambda *a: seen.append(a), TEXT, **SMALL)
    back = load_hf(tmp_path / "out").params
    assert seen == [(i, 5) for i in range(1, 6)] and not list(tmp_path.glob(".*"))
    (a, inputs), (b, _) = leaves(back), leaves(wanted)
    same(a, b)
    down, ours = (trees.get(t, "model.layers.1.mlp.down_proj") for t in (back, wanted))
    assert list(inputs) == ["model.layers.1.mlp.down_proj"] and down.act.name == "int8:tensor"
    np.testing.assert_array_equal(down.op.left, ours.op.left)
    np.testing.assert_array_equal(down.params["scale"], ours.params["scale"])

    with pytest.raises(Interrupted):
        gptq.quantize_dir(src, plan, tmp_path / "again", interrupt_at(2), TEXT, **SMALL)
    kept = [p.stat().st_ino for p in sorted(tmp_path.glob(".again.partial/*/*/*.safetensors"))]
    gptq.quantize_dir(src, plan, tmp_path / "again", None, TEXT, **SMALL)
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(kept) == 2 and [p.stat().st_ino for p in shards[:2]] == kept
    for p, q in zip(shards, sorted((tmp_path / "out").glob("*.safetensors")), strict=True):
        assert p.read_bytes() == q.read_bytes()
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "out/config.json").read_text()


@pytest.mark.slow
def test_other_options_or_text_start_anew(src, tmp_path):
    with pytest.raises(Interrupted):
        gptq.quantize_dir(src, PLAN, tmp_path / "out", interrupt_at(2), TEXT, **SMALL)
    (first,) = tmp_path.glob(".out.partial/*")
    for options, text in ((SMALL | {"damping": 0.02}, TEXT), (SMALL, TEXT[::-1])):
        with pytest.raises(Interrupted):
            gptq.quantize_dir(src, PLAN, tmp_path / "out", interrupt_at(1), text, **options)
        (now,) = tmp_path.glob(".out.partial/*")
        assert now.name != first.name


@pytest.mark.slow
def test_rtn_keeps_online_transforms(src, tmp_path):
    """A folder whose linears are transformed online, rounded to nearest; then once more: its packed weights stay."""
    rtn.quantize_dir(src, Plan((Rule(r".*\.0\..*", "int8"),), "int4:g32"), tmp_path / "a")
    leaf = trees.get(load_hf(tmp_path / "a").params, "model.layers.1.mlp.down_proj")
    assert leaf.op.name == "kronecker:8x16" and leaf.w.format.name == "int4:g32"
    rtn.quantize_dir(tmp_path / "a", Plan((Rule("lm_head", "int8"),)), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert len(config["formats"]) == 15 and config["online"] == {"model.layers.1.mlp.down_proj": "kronecker:8x16"}
    before, after = (dict(trees.items(load_hf(tmp_path / n).params)) for n in "ab")
    path = "model.layers.0.mlp.up_proj"
    same({path: after[path]}, {path: before[path]})


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_caches_come_along(solver, src, tmp_path):
    """Cache formats of a plan, in memory and in folders, through an interruption."""
    plan = Plan((Rule(r".*\.k_cache", "int4:token"), Rule(r".*\.0\..*v_cache", "int8:token")), "int8")
    solve, m = base.get(solver), load_hf(src)
    options = {"documents": TEXT, **(SMALL if solver == "gptq" else {})}
    wanted = dict(trees.items(solve.quantize(m, plan.resolve(m.config.shapes()), **options)))
    with pytest.raises(Interrupted):
        solve.quantize_dir(src, plan, tmp_path / "out", interrupt_at(3), **options)
    solve.quantize_dir(src, plan, tmp_path / "out", **options)
    back = dict(trees.items(load_hf(tmp_path / "out").params))
    found = {p: x.name for p, x in back.items() if p.endswith("_cache")}
    assert found == {p: x.name for p, x in wanted.items() if p.endswith("_cache")} and len(found) == 3
    path = "model.layers.1.self_attn.o_proj"
    same({path: back[path]}, {path: wanted[path]})


def test_command(src, tmp_path, capsys):
    (tmp_path / "calib.txt").write_text("".join(TEXT))
    args = ["quantize", str(src), "--format", "int4:g32", "--solver", "gptq", "--out", str(tmp_path / "out")]
    assert main(args) == 2 and "without --calib" in capsys.readouterr().err
    args += ["--calib", str(tmp_path / "calib.txt")]
    assert main([*args, "--gptq.rows", "5000"]) == 2
    assert "needed: 640000 tokens for 5000 rows" in capsys.readouterr().err
    assert main([*args, "--gptq.damping", "2"]) == 2 and "damping is 2.0 (allowed: 0 to 1)" in capsys.readouterr().err
    assert main([*args, "--solver", "rtn", "--gptq.rows", "3"]) == 2 and "--gptq options" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    assert main([*args, "--gptq.rows", "3", "--gptq.length", "64", "--gptq.batch", "2", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["solver"] == "gptq" and "quantize 5/5" in out.err
    m = load_hf(src)
    wanted = gptq.quantize(m, Plan.uniform("int4:g32").resolve(m.config.shapes()), ["".join(TEXT)], **SMALL)
    same(leaves(load_hf(tmp_path / "out").params)[0], leaves(wanted)[0])


@pytest.mark.slow
def test_beats_nearest_on_a_trained_model():
    """stories260K at three bits, calibrated on other stories than it is measured on."""
    m = load_llama2c(shared_path("data/models/stories260K/stories260K.bin"))
    text = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_text(encoding="utf-8")
    calibration = text.split("<|endoftext|>")[400:500]
    plan = Plan((Rule(".*down_proj", "int3:g43"),), "int3:g64").resolve(m.config.shapes())
    kl = {}
    for name, params in (
        ("rtn", rtn.quantize(m.params, plan)),
        ("gptq", gptq.quantize(m, plan, calibration, rows=24, length=256)),
    ):
        kl[name] = evaluate(m.replace(params=params), text, m, "stories-256")["kl_mean"]
    assert kl["gptq"] < 0.75 * kl["rtn"]


def test_readers_of_a_tree():
    m = tiny()
    assert {p: f() is leaf for (p, f), (_, leaf) in zip(readers_of(m.params).items(), trees.items(m.params))} == {
        p: True for p, _ in trees.items(m.params)
    }

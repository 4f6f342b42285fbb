"""Folders in the layouts of other runtimes: what the command writes, read by independent readers; damage; refusals."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowbit import tree as trees
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.export.layouts import export_layout
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor, unpacked
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.hf import iter_tensors, readers, save_hf, stored_kinds
from lowbit.models.model import with_inputs
from lowbit.vq.layouts import LAYOUTS
from lowbit.vq.layouts.base import common_scale, factors
from tests.export import layout_readers
from tests.export.coded import SCALE, coded_model, weight

FORMATS = {
    "aqlm": "aqlm:2x4:g4",
    "vptq": "vptq:v4:k32:r8:s",
    "exl3": "rht128:f16:trellis2:mcg",
    "quip": "rht:f16:e8p3",
    "qtip": "rht:f16:trellis2:hyb:qtip",
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
# What the transform's float32 may do to a weight, and what fp16 vectors may (docs/export.md), of the largest weight.
EXACT, HALF = 2.0**-19, 2.0**-11


def read(target: str, folder, path: str, shape):
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return getattr(layout_readers, target)(tensors, config, path, shape)


def level(q: QTensor) -> np.ndarray:
    """What the codes of a rotated weight stand for, before any scale."""
    inner, (codes, stored) = q.format.inner, unpacked(q)
    own = {k: a for k, a in stored.items() if k not in ("su", "sv")}
    return np.asarray(inner.dequantize(codes, own | {"scale": jnp.ones((1, 1))}))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(target)`: the model and the folder that `lowbit export` made of it, and its report; once each."""
    found = {}

    def get(target: str, capsys):
        if target not in found:
            here = tmp_path_factory.mktemp(target)
            model = coded_model(FORMATS[target])
            save_hf(model, here / "m", None, packed=True)
            capsys.readouterr()
            code = main(["export", str(here / "m"), "--to", target, "--out", str(here / "out"), "--json"])
            output = capsys.readouterr()
            assert code == 0, output.err
            found[target] = model, here / "out", json.loads(output.out)
        return found[target]

    return get


@pytest.mark.parametrize("target", FORMATS)
def test_the_command_writes_what_an_independent_reader_reads(target, written, capsys):
    model, folder, report = written(target, capsys)
    flat = dict(trees.items(model.params))
    assert 0 <= report["kl_mean"] < 1e-5 and report["weights"] == model.config.num_params
    assert (folder / "tokenizer.json").is_file()
    tensors = load_file(folder / "model.safetensors")
    kinds = stored_kinds(folder)
    for path, leaf in flat.items():
        if isinstance(leaf, QTensor):
            assert kinds[path].name == FORMATS[target]
        else:
            name = path if path.endswith(".bias") else f"{path}.weight"
            np.testing.assert_array_equal(tensors[name], np.asarray(leaf).astype(np.float16))
    for path in (Q, DOWN):
        rotated, dense = read(target, folder, path, flat[path].shape)
        ours = np.asarray(flat[path].decode())
        if rotated is None:
            np.testing.assert_array_equal(dense.astype(np.float32), ours)
            continue
        np.testing.assert_array_equal(rotated.astype(np.float32), level(flat[path]))
        assert np.abs(dense - ours).max() <= (HALF if target == "exl3" else EXACT) * np.abs(ours).max()
    assert (Q in report["rounded"]) == (target == "exl3")  # its vectors, times the scale, are fp16


def test_exl3_describes_its_tensors(written, capsys):
    _, folder, report = written("exl3", capsys)
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]
    more = json.loads((folder / "quantization_config.json").read_text())
    assert quant["bits"] == 2 and quant["head_bits"] == 16 and quant["codebook"] == "mcg"
    own = more.pop("tensor_storage")[DOWN]
    assert more == quant and own["mcg_multiplier"] == 0xCBAC1FED and own["bits_per_weight"] == 2
    assert own["stored_tensors"][f"{DOWN}.trellis"] == {"shape": [16, 8, 32], "n_bytes": 8192, "dtype": "torch.int16"}
    assert any("weights differ by up to" in note for note in report["notes"])


def test_configurations_say_what_is_kept_and_how_codes_are_read(written, capsys):
    def config(target: str) -> dict:
        return json.loads((written(target, capsys)[1] / "config.json").read_text())

    kept = config("aqlm")["quantization_config"]["linear_weights_not_to_quantize"]
    assert kept == ["lm_head", "lm_head.weight"]
    assert config("vptq")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    quip, qtip = config("quip"), config("qtip")
    assert "quantization_config" not in quip and "quantization_config" not in qtip  # transformers knows no such method
    params = {k: quip["quip_params"][k] for k in ("codebook", "codebook_version", "idx_dtype", "packsz", "lora_rank")}
    assert params == {"codebook": "E8P12RVQ3B", "codebook_version": 0, "idx_dtype": "torch.int64", "packsz": 8 / 3,
                      "lora_rank": 0}  # fmt: skip
    params = {k: qtip["quip_params"][k] for k in ("L", "K", "V", "tlut_bits", "decode_mode", "skip_list")}
    assert params == {"L": 16, "K": 2, "V": 2, "tlut_bits": 9, "decode_mode": "quantlut_sym", "skip_list": []}


@pytest.mark.parametrize("target", FORMATS)
def test_commands_open_the_folder(target, written, capsys, tmp_path):
    _, folder, _ = written(target, capsys)
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == f"hf-{target}"
    assert main(["quantize", str(folder), "--format", "int4:g32", "--out", str(tmp_path / "q")]) == 2
    assert "q_proj is quantized already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aqlm", "exl3"])
def test_evaluated_and_exported_again(target, written, capsys, tmp_path):
    """To our own packed folder with the same bits, and back to the same file."""
    _, folder, _ = written(target, capsys)
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert main(["eval", str(folder), "--text", str(tmp_path / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    for to, source, out in (("packed", folder, tmp_path / "p"), (target, tmp_path / "p", tmp_path / "again")):
        assert main(["export", str(source), "--to", to, "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kl_mean"] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# -- damage -----------------------------------------------------------------------------------------------------------


def cut(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a[..., :-1])


CODES = {"aqlm": "codes", "vptq": "indices", "exl3": "trellis", "quip": "Qidxs", "qtip": "trellis"}
DAMAGE = [
    (target, f"{Q}.{name}", cut, rf"tensor {Q}.{name} (has shape|has 31 words)") for target, name in CODES.items()
]
DAMAGE += [(target, f"{Q}.{name}", None, f"lacks .* tensors .*{Q}.{name}") for target, name in CODES.items()]
DAMAGE += [
    ("aqlm", f"{Q}.scales", lambda a: a[:-1], rf"tensor {Q}.scales has shape \[127, 1, 1, 1\]"),
    ("aqlm", f"{Q}.codes", lambda a: a + 16, rf"{Q}: code \d+ of a codebook of 16 vectors .allowed: -8 to 15."),
    ("aqlm", f"{Q}.codes", lambda a: a.astype(np.int16), rf"{Q}.codes has dtype int16 .allowed: int8."),
    ("aqlm", f"{Q}.codebooks", lambda a: a * np.float16(np.nan), f"{Q}.codebooks holds .* NaN"),
    ("vptq", f"{Q}.centroids.weight", cut, rf"{Q}.centroids.weight has shape \[1, 127\]"),
    ("vptq", f"{Q}.weight_bias", lambda a: a + 1, f"{Q}: weight_bias is not 0"),
    ("exl3", f"{Q}.suh", cut, rf"{Q}.suh has shape \[127\]"),
    ("exl3", f"{Q}.mcg", lambda a: a + 1, f"{Q}: mcg has multiplier 0xcbac1fee"),
    ("quip", f"{Q}.codebook_id", lambda a: a - 1, f"{Q}: codebook_id is 17 .allowed: 18."),
    ("quip", f"{Q}.Wscale", lambda a: -a, f"{Q}: Wscale is -0.123.* .allowed: above 0."),
    ("qtip", f"{Q}.rcp", lambda a: a + 1, f"{Q}: rcp is 1"),
    ("qtip", f"{Q}.SV", lambda a: a * np.linspace(1, 2, len(a), dtype="f4"), f"{Q}: SV is no fp16 vector times"),
    ("qtip", f"{Q}.tlut", lambda a: a[:-1], rf"{Q}.tlut has shape \[511, 2\]"),
]


@pytest.mark.parametrize("target, name, change, message", DAMAGE)
def test_damaged_tensors_are_refused_by_name(target, name, change, message, written, capsys, tmp_path):
    _, folder, _ = written(target, capsys)
    tensors = load_file(folder / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.asarray(change(tensors[name]))
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as e:
        readers(tmp_path)[Q]()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("target", FORMATS)
def test_a_truncated_file_is_refused(target, written, capsys, tmp_path):
    _, folder, _ = written(target, capsys)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(InputError, match="model.safetensors is truncated or damaged"):
        readers(tmp_path)


SETTINGS = [
    ("aqlm", ("quantization_config", "out_group_size"), 2, r"out_group_size is 2 \(allowed: 1\)"),
    ("aqlm", ("quantization_config", "nbits_per_codebook"), 17, r"nbits_per_codebook is 17 \(allowed: 1 to 16\)"),
    ("aqlm", ("quantization_config", "quant_method"), "other", "unknown quant_method in config.json 'other'"),
    ("aqlm", ("quantization_config",), "aqlm", "quantization_config is 'aqlm' .allowed: an object"),
    ("aqlm", ("quantization_config", "linear_weights_not_to_quantize"), None, "is None .allowed: a list of tensors"),
    ("exl3", ("quip_params",), 7, "quip_params is 7 .allowed: an object"),
    ("vptq", ("quantization_config", "config_for_layers", Q, "outlier_size"), 8, f"of {Q}: outlier_size is 8"),
    ("vptq", ("quantization_config", "config_for_layers", Q, "num_centroids"), [-1, 31], "codebook of 31 vectors"),
    ("vptq", ("quantization_config", "config_for_layers", "nowhere"), {}, "describes nowhere, which is no linear"),
    ("quip", ("quip_params", "codebook"), "D4", "unknown codebook of quip_params 'D4'"),
    ("quip", ("quip_params", "resid_scale_override"), 99, "resid_scale_override is 99"),
    ("qtip", ("quip_params", "decode_mode"), "2mad", "unknown decode_mode of quip_params '2mad'"),
    ("qtip", ("quip_params", "td_x"), 8, r"td_x is 8 \(allowed: 16\)"),
    ("qtip", ("quip_params", "K_v_proj"), 2.5, r"K_v_proj is 2.5 \(allowed: 1 to 8\)"),
    ("qtip", ("quip_params", "skip_list"), 3, "skip_list is 3 .allowed: a list or null"),
    ("qtip", ("quip_params", "decode_mode"), ["x"], "unknown decode_mode of quip_params"),
    ("quip", ("quip_params", "codebook"), ["x"], "unknown codebook of quip_params"),
    ("quip", ("quip_params", "resid_scale_override"), True, "resid_scale_override is True"),
    ("aqlm", ("quantization_config", "quant_method"), "quip", "quant_method is 'quip' without quip_params"),
    ("qtip", ("quip_params", "K"), 2.5, r"K is 2.5 \(allowed: 1 to 8\)"),
]


@pytest.mark.parametrize("target, keys, value, message", SETTINGS)
def test_settings_that_no_format_has(target, keys, value, message, written, capsys, tmp_path):
    _, folder, _ = written(target, capsys)
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as e:
        readers(tmp_path)
    assert "\n" not in str(e.value)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ("aqlm", "nuq2", (32, 32), "it has no additive codebooks"),
    ("vptq", "nuq2", (32, 32), "it has no codebook of vectors along the outputs"),
    ("vptq", "vptq:v4:k4:o2", (32, 32), "outlier columns have another layout"),
    ("vptq", "vptq:v4:k4:r8", (32, 32), "reader loses bits"),
    ("exl3", "trellis2:mcg", (128, 128), "it is not rotated"),
    ("exl3", "rht:trellis2:mcg", (128, 128), "it is rotated over the full width, not blocks of 128"),
    ("exl3", "rht128:e8p2", (128, 128), "it has none of EXL3's codes"),
    ("exl3", "rht128:trellis2:latin", (128, 128), "it has none of EXL3's codes"),
    ("exl3", "rht128:trellis2.5:mul1", (128, 128), "2.5 bits are no whole number"),
    ("exl3", "rht128:trellis2:mcg:l12", (128, 128), "its trellis has L 12"),
    ("exl3", "rht128:trellis2:mcg:qtip", (128, 128), "its tiles are in the order 'qtip'"),
    ("exl3", "rht128:blocks:trellis2:mcg", (128, 192), "a side of 192 is no multiple of 128"),
    ("quip", "e8p2", (128, 128), "it is not rotated"),
    ("quip", "rht128:e8p2", (128, 128), "it is rotated over blocks of 128, not the full width"),
    ("quip", "rht:e8p2", (96, 128), "a side of 96 is no power of two"),
    ("quip", "rht:e8p2", (128, 32), "no multiple of the kernel's 16 x 64"),
    ("quip", "rht:trellis2:mcg", (128, 128), "it has no E8P codes"),
    ("qtip", "rht128:trellis2:hyb:qtip", (128, 128), "it is rotated over blocks of 128"),
    ("qtip", "rht:trellis2:mcg:rows", (128, 128), "it has none of QTIP's codes"),
    ("qtip", "rht:trellis2:hyb", (128, 128), "in the order 'exl3', and its kernel reads 'qtip'"),
    ("qtip", "rht:trellis2:3inst:qtip", (128, 128), "and QTIP without a kernel for it reads 'rows'"),
    ("qtip", "rht:trellis2.5:hyb:rows", (128, 128), "2.5 bits are no whole number"),
    ("qtip", "rht:trellis2:hyb:qtip", (16, 32), "no multiple of the kernel's 32"),
]


@pytest.mark.parametrize("target, format, shape, why", REFUSED)
def test_what_a_layout_does_not_hold(target, format, shape, why):
    assert why in LAYOUTS[target].why_not(Q, formats.get(format), shape)


def test_refusals_name_the_tensor_and_what_is_allowed(tmp_path, capsys):
    out = tmp_path / "out"
    cases = [
        (
            "aqlm",
            coded_model("vptq:v4:k4"),
            f"{'model.layers.0.self_attn.q_proj'} has format 'vptq:v4:k4': .*aqlm:MxB:gG",
        ),
        (
            "aqlm",
            coded_model("aqlm:1x4:g4", {"down_proj": "aqlm:2x4:g4"}),
            "down_proj is in aqlm:2x4:g4 and .* one aqlm",
        ),
        ("aqlm", coded_model(""), "a model without packed weights .allowed with target aqlm: weights in aqlm:MxB:gG."),
        ("aqlm", coded_model("aqlm:1x4:g4", {"embed_tokens": "aqlm:1x4:g4"}), "embed_tokens has format .*looked up"),
        (
            "quip",
            coded_model("rht:e8p2", {"o_proj": ""}),
            "o_proj is not packed .allowed with target quip: all linears",
        ),
        ("quip", coded_model("rht:e8p2", {"o_proj": "rht:e8p3"}), "o_proj is in rht:e8p3 and .* one e8pN for all"),
        ("qtip", coded_model("rht:trellis2:3inst:rows", {"o_proj": "rht:trellis3:3inst:rows"}), "qtip: one K"),
    ]
    acts = with_inputs(coded_model("aqlm:1x4:g4"), "int8:token")
    cases.append(("aqlm", acts, "quantizes its input .int8:token.*, which the file cannot hold .*drop_activations"))
    for target, model, message in cases:
        with pytest.raises(InputError, match=message) as e:
            export_layout(model, out, target)
        assert "\n" not in str(e.value) and not out.exists()
    export_layout(acts, out, "aqlm", drop_activations=True)
    flat = dict(trees.items(acts.params))
    assert isinstance(flat[Q], PreparedInput)
    found = dict(iter_tensors(out, lambda path: path == Q))[Q]
    np.testing.assert_array_equal(found.arrays["codes"], flat[Q].w.arrays["codes"])
    assert main(["export", "m", "--to", "exl3:2", "--out", str(out)]) == 2
    assert "unknown export target 'exl3:2'" in capsys.readouterr().err


# -- other rates and codes --------------------------------------------------------------------------------------------

VARIANTS = [
    ("aqlm", "aqlm:1x9:g8", (128, 256), 0),
    ("vptq", "vptq:v8:k64", (64, 96), 0),
    ("exl3", "rht128:trellis1:3inst", (128, 128), EXACT),
    ("exl3", "rht128:trellis8:mul1", (128, 256), EXACT),
    ("exl3", "rht128:trellis3:mcg", (256, 128), EXACT),
    ("quip", "rht:e8p2", (64, 128), EXACT),
    ("quip", "rht:f16:e8p4:rho1.03:r3.45", (32, 64), EXACT),
    ("qtip", "rht:trellis4:hyb:qtip", (64, 128), EXACT),
    ("qtip", "rht:trellis1:hyb:rows", (64, 32), EXACT),
    ("qtip", "rht:f16:trellis3:1mad:rows", (32, 64), EXACT),
    ("qtip", "rht:trellis2:lut:l8:v2:rows", (32, 64), EXACT),
    ("qtip", "rht:trellis5:3inst:l12:rows", (16, 32), EXACT),
]


@pytest.mark.slow
@pytest.mark.parametrize("target, format, shape, bound", VARIANTS)
def test_one_weight_in_other_rates_and_codes(target, format, shape, bound):
    """The independent reader's weight is ours within `bound` of the largest, and reading back gives the codes."""
    layout, q = LAYOUTS[target], weight(formats.get(format), shape, 0)
    assert layout.why_not(Q, q.format, shape) is None
    arrays, config = layout.tensors(q), json.loads(json.dumps(layout.config({Q: (q.format, shape)}, [])))
    tensors = {f"{Q}.{k}": a for k, a in arrays.items()}
    rotated, dense = getattr(layout_readers, target)(tensors, config, Q, shape)
    ours = np.asarray(q.decode())
    assert np.abs(dense - ours).max() <= bound * np.abs(ours).max()

    class Stored(dict):
        def shape(self, name):
            return self[name].shape

    entry = layout.entries(config, {Q: shape}, Stored(tensors))[Q]
    assert {k: (a.shape, str(a.dtype)) for k, a in arrays.items()} == entry.tensors
    back = entry.load(arrays)
    np.testing.assert_array_equal(back.arrays["codes"], q.arrays["codes"])
    again = np.asarray(dataclasses.replace(back, dtype=q.dtype).decode())
    assert (np.abs(again - ours) <= layout.slack(ours)).all()
    if rotated is not None:
        unit = 147.800537109375 if ":1mad" in format else 1.0
        np.testing.assert_array_equal((rotated * unit).astype(np.float32), level(q))


def test_rates_differ_between_weights(tmp_path):
    """EXL3 has a rate and a code for each weight, also for the head; QTIP one K for v_proj and one for the others, and
    a list of linears that keep their weight."""
    others = {"down_proj": "rht128:trellis3:mul1", "lm_head": "rht128:trellis4:3inst"}
    out, model = tmp_path / "exl3", coded_model("rht128:trellis2:mcg", others, vocab_size=384)
    export_layout(model, out, "exl3")
    kinds, quant = stored_kinds(out), json.loads((out / "config.json").read_text())["quantization_config"]
    assert {kinds[p].name for p in (Q, DOWN, "lm_head")} == {
        f"rht128:f16:trellis{code}" for code in ("2:mcg", "3:mul1", "4:3inst")
    }
    assert quant["head_bits"] == 4 and 2 < quant["bits"] < 3
    others = {"v_proj": "rht:trellis4:3inst:rows", "o_proj": ""}
    out, model = tmp_path / "qtip", coded_model("rht:trellis2:3inst:rows", others)
    export_layout(model, out, "qtip")
    kinds, params = stored_kinds(out), json.loads((out / "config.json").read_text())["quip_params"]
    assert params["K"] == 2 and params["K_v_proj"] == 4 and params["skip_list"] == ["0_o"]
    assert kinds[Q.replace("q_", "v_")].name == "rht:f16:trellis4:3inst:rows"
    assert kinds[Q].name == "rht:f16:trellis2:3inst:rows" and kinds[Q.replace("q_", "o_")] == "float16"


def test_factors_of_a_scale():
    """Two fp16 numbers come within 2^-18 of any scale; a scale and fp16 values are found in their products."""
    rng = np.random.default_rng(0)
    for scale in np.exp(rng.uniform(-10, 3, 200)):
        a, b = factors(scale)
        assert np.float16(a) == a and np.float16(b) == b and abs(a * b / scale - 1) <= 2.0**-18
    assert factors(0.375) == (0.5, 0.75) or np.prod(factors(0.375)) == 0.375
    signs = rng.choice([-1.0, 1.0], 50)
    scale, y = common_scale(signs * SCALE)
    assert scale == SCALE and np.array_equal(y, signs)
    x = (1 + rng.integers(0, 1024, 64) / 1024) * signs[0] * SCALE
    scale, y = common_scale(x)
    assert y.dtype == np.float16 and np.array_equal(y.astype(float) * scale, x)
    assert common_scale(np.array([1.0, 0.0])) is None and common_scale(np.array([1.0, 1 + 2.0**-20])) is None

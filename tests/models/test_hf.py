import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.activation import get_act
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.hf import iter_tensors, load_hf, resolve, save_hf
from lowbit.models.shards import Shards, ShardWriter
from tests.models.tiny import CONFIGS, quantized, tiny

X = np.arange(1, 30)
PACKED = {
    "model.layers.0.self_attn.q_proj": "int4:g16",
    "model.layers.1.mlp.down_proj": "int3:g16:asym",
    "model.layers.2.mlp.up_proj": "ternary:tensor",
    "model.embed_tokens": "int8:channel:bf16",
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, name, dtype):
    model = tiny(name, dtype=jnp.dtype(dtype))
    save_hf(model, tmp_path / "m", dtype=dtype)
    back = load_hf(tmp_path / "m")
    assert back.config == model.config and back.meta == {"format": "hf", "dtype": dtype}
    same(back.params, model.params)
    assert [p for p, _ in trees.items(back.params)] == list(model.config.shapes())


def test_the_safetensors_library_reads_our_files(tmp_path):
    model = tiny()
    save_hf(model, tmp_path, dtype="float32", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for path, leaf in trees.items(model.params):
        name = hf.tensor_name(path)
        with safe_open(tmp_path / index["weight_map"][name], "numpy") as f:
            np.testing.assert_array_equal(f.get_tensor(name), leaf)
    assert max(p.stat().st_size for p in tmp_path.glob("*.safetensors")) < 20_000 + 4096
    same(load_hf(tmp_path).params, model.params)


def test_casts_round_to_nearest_even(tmp_path):
    model = tiny()
    save_hf(model, tmp_path)
    want = np.asarray(model.params["lm_head"]).astype(ml_dtypes.bfloat16)
    got = load_hf(tmp_path)
    np.testing.assert_array_equal(np.asarray(got.params["lm_head"]), want)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == got.meta["dtype"] == "bfloat16"


def test_dtype_none_keeps_each(tmp_path):
    params = trees.map_leaves(lambda p, a: a if a.ndim == 1 else a.astype(jnp.bfloat16), tiny().params)
    save_hf(tiny().replace(params=params), tmp_path, dtype=None)
    same(load_hf(tmp_path).params, params)


def test_packed_gives_the_same_qtensors(tmp_path):
    model = quantized(tiny(), PACKED)
    save_hf(model, tmp_path, dtype="float32", packed=True)
    back = load_hf(tmp_path)
    same(back.params, model.params)
    assert back.meta["format"] == "hf-packed"
    np.testing.assert_array_equal(back.logits(X), model.logits(X))
    assert (tmp_path / "model.safetensors").stat().st_size < sum(
        x.nbytes for x in jax.tree.leaves(model.params)
    ) + 8 + 120 * len(jax.tree.leaves(model.params))


def test_latent_weights_are_saved_as_their_codes(tmp_path):
    latent = quantized(tiny(), PACKED, latent=True)
    save_hf(latent, tmp_path / "packed", dtype="float32", packed=True)
    save_hf(latent, tmp_path / "plain", dtype="float32")
    leaf = trees.get(load_hf(tmp_path / "packed").params, "model.layers.1.mlp.down_proj")
    assert isinstance(leaf, QTensor) and leaf.format.name == "int3:g16:asym"
    want = trees.get(latent.params, "model.layers.1.mlp.down_proj").value()
    np.testing.assert_array_equal(leaf.decode(), want)
    np.testing.assert_array_equal(trees.get(load_hf(tmp_path / "plain").params, "model.layers.1.mlp.down_proj"), want)


def test_activation_formats_and_our_own_architecture_survive_packing(tmp_path):
    model = quantized(tiny("bit"), {"model.layers.0.mlp.up_proj": "ternary:tensor:f32"})
    act = get_act("int8:token:bitnet")
    wrap = lambda p, a: PreparedInput(a, act) if "_proj" in p else a  # noqa: E731
    model = model.replace(params=trees.map_leaves(wrap, model.params))
    save_hf(model, tmp_path / "m", dtype="float32", packed=True)
    back = load_hf(tmp_path / "m")
    assert back.config == model.config
    same(back.params, model.params)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot have this decoder's input_norm, linear_norm"):
        save_hf(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_iter_tensors_is_lazy_and_in_order(tmp_path, monkeypatch):
    model = quantized(tiny(), PACKED)
    save_hf(model, tmp_path, dtype="bfloat16", packed=True)
    reads = []
    original = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: reads.append(name) or original(self, name))
    it = iter_tensors(tmp_path)
    assert next(it)[0] == "model.embed_tokens" and isinstance(next(it)[1], QTensor)
    assert len(reads) == 4
    rest = dict(it)
    assert isinstance(rest["lm_head"], np.ndarray) and rest["lm_head"].dtype == ml_dtypes.bfloat16
    only = list(iter_tensors(tmp_path, only=lambda p: p == "lm_head"))
    assert [p for p, _ in only] == ["lm_head"]


def test_harmless_extras_are_ignored(tmp_path):
    model = tiny("llama3")
    save_hf(model, tmp_path, dtype="float32")

    def extend(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(tmp_path, extend)
    same(load_hf(tmp_path).params, model.params)


# -- damage -----------------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Applies `change` to the dict of tensors and writes the file anew."""
    shards = Shards(folder)
    tensors = {n: shards.read(n) for n in shards}
    change(tensors)
    writer = ShardWriter(folder, 1 << 30)
    for name, a in tensors.items():
        writer.add(name, np.asarray(a))
    writer.close()


def edit_config(**changes):
    def do(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | changes))

    return do


def edit_bytes(change):
    def do(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return do


def put(name, value):
    return lambda folder: rewrite(folder, lambda t: t.__setitem__(name, value(t.get(name))))


def drop(*ends):
    def change(tensors):
        for name in [n for n in tensors if n.endswith(ends)]:
            del tensors[name]

    return lambda folder: rewrite(folder, change)


def nan(a):
    a = a.copy()
    a.flat[5] = np.nan
    return a


UP = "model.layers.1.mlp.up_proj"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in "),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in .*allowed: model.safetensors"),
    "truncated": (edit_bytes(lambda b: b[:-100]), "is truncated or damaged: .*its header needs"),
    "too long": (edit_bytes(lambda b: b + b"abc"), "is truncated or damaged"),
    "empty": (edit_bytes(lambda b: b""), "is truncated or no safetensors file: 0 bytes"),
    "html": (edit_bytes(lambda b: b"<html>not found</html>"), "is truncated or no safetensors file"),
    "header": (edit_bytes(lambda b: b[:8] + b"x" + b[9:]), "corrupt safetensors header"),
    "missing one": (drop("1.mlp.up_proj.weight"), "lacks 1 tensors .*layers.1.mlp.up_proj.weight"),
    "missing many": (drop("up_proj.weight", "norm.weight"), "lacks 10 tensors .* and 7 more"),
    "wrong shape": (put(UP + ".weight", lambda a: a[:-1]), r"up_proj.weight has shape \[47, 32\] .*\[48, 32\]"),
    "wrong dtype": (put(UP + ".weight", lambda a: a.astype(np.int32)), "up_proj.weight has dtype int32 .*bfloat16"),
    "extra": (put("model.layers.1.mlp.extra.weight", lambda _: np.ones(3, np.float32)), "1 tensors .*mlp.extra.weight"),
    "bias unexplained": (put(UP + ".bias", lambda _: np.ones(48, np.float32)), "does not explain: .*up_proj.bias"),
    "nan": (put(UP + ".weight", nan), "up_proj.weight holds 1 or more NaN"),
    "inf": (put("model.norm.weight", lambda a: a * np.inf), "model.norm.weight holds 32 or more NaN or infinite"),
    "architecture": (edit_config(model_type="falcon"), "unknown model_type 'falcon'.*llama"),
    "no model_type": (edit_config(model_type=None), "unknown model_type None"),
    "activation": (edit_config(hidden_act="swish2"), "unknown hidden_act 'swish2'"),
    "rope": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "unknown rope type 'yarn'.*llama3"),
    "rope factor": (edit_config(rope_scaling={"rope_type": "linear"}), "factor of rope type 'linear' is None"),
    "no hidden size": (edit_config(hidden_size=None), "has no 'hidden_size'"),
    "odd hidden size": (edit_config(hidden_size="32"), "hidden_size is '32' .*positive int"),
    "heads": (edit_config(num_key_value_heads=3), "4 heads, 3 key-value heads"),
    "quant method": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        "unknown quant_method .*'gptq'.*lowbit",
    ),
    "shape by config": (edit_config(vocab_size=60), r"embed_tokens.weight has shape \[61, 32\] .*\[60, 32\]"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(tmp_path, case):
    damage, message = DAMAGE[case]
    save_hf(tiny(), tmp_path / "m", dtype="float32")
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message) as e:
        load_hf(tmp_path / "m")
    assert "\n" not in str(e.value)


def edit_formats(**changes):
    def do(folder):
        raw = json.loads((folder / "config.json").read_text())
        raw["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(raw))

    return do


PACKED_DAMAGE = {
    "lost codes": (drop("down_proj.codes"), "lacks 1 tensors .*down_proj.codes"),
    "codes shape": (put("model.layers.1.mlp.down_proj.codes", lambda a: a[:, :-1]), "codes has shape"),
    "codes dtype": (put("model.layers.1.mlp.down_proj.codes", lambda a: a.astype(np.int8)), "codes has dtype int8"),
    "nan scale": (put("model.layers.2.mlp.up_proj.scale", lambda a: a * np.nan), "scale holds 1 or more NaN"),
    "format": (edit_formats(formats={"lm_head": "int99"}), "int99"),
    "path": (edit_formats(formats={"model.layers.9.mlp.up_proj": "int4"}), "layers.9.mlp.up_proj"),
    "format of a norm": (edit_formats(formats={"model.norm": "int4"}), "no matrix of the model: model.norm"),
    "version": (edit_formats(version=2), "packed version 2 .allowed: 1"),
    "dtype": (edit_formats(dtypes={"model.embed_tokens": "int8"}), "unknown dtype of model.embed_tokens"),
}


@pytest.mark.parametrize("case", PACKED_DAMAGE)
def test_damaged_packed_folders(tmp_path, case):
    damage, message = PACKED_DAMAGE[case]
    save_hf(quantized(tiny(), PACKED), tmp_path / "m", packed=True)
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message) as e:
        load_hf(tmp_path / "m")
    assert "\n" not in str(e.value)


def test_a_lost_shard(tmp_path):
    save_hf(tiny(), tmp_path, dtype="float32", max_shard_bytes=20_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match="names the shard 'model-00002-of-"):
        load_hf(tmp_path)


def test_an_index_cannot_point_out_of_the_folder(tmp_path):
    save_hf(tiny(), tmp_path / "m", dtype="float32", max_shard_bytes=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.safetensors"}}))
    with pytest.raises(InputError, match="names the shard '../x.safetensors'"):
        load_hf(tmp_path / "m")


# -- saving -----------------------------------------------------------------------------------------------------------


def break_leaf(path, value):
    model = tiny()
    return model.replace(params=trees.map_leaves(lambda p, a: value(a) if p == path else a, model.params))


@pytest.mark.parametrize(
    "model, options, message",
    [
        (break_leaf("model.norm", lambda a: a * jnp.nan), {}, "cannot save: model.norm holds"),
        (break_leaf("lm_head", lambda a: a * 1e6), {"dtype": "float16"}, "cannot save as float16: lm_head"),
        (tiny().replace(params={"lm_head": jnp.ones((61, 32))}), {}, "lacks 29 parameters: "),
        (tiny(), {"dtype": "int8"}, "unknown dtype 'int8'"),
        (tiny(qkv_bias=True), {}, "cannot have this decoder's qkv_bias"),
    ],
)
def test_save_refuses_and_leaves_nothing(tmp_path, model, options, message):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=message):
        save_hf(model, tmp_path / "m", **options)
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "notes.txt"]


def test_saving_over_a_model_replaces_it_and_keeps_other_files(tmp_path):
    save_hf(tiny(), tmp_path, dtype="float32", max_shard_bytes=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    save_hf(tiny("qwen3"), tmp_path, dtype="float32")
    assert load_hf(tmp_path).config == CONFIGS["qwen3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/m"):
        save_hf(tiny(), tmp_path / "file" / "m")


def test_tokenizer_files_are_carried_over(tmp_path):
    save_hf(tiny(), tmp_path / "a", dtype="float32")
    (tmp_path / "a" / "special_tokens_map.json").write_text('{"x": 1}')
    save_hf(load_hf(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "special_tokens_map.json").read_text() == '{"x": 1}'


# -- hub --------------------------------------------------------------------------------------------------------------


def test_resolve(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    for bad in ("no/such/folder", "./none", "name"):
        with pytest.raises(InputError, match="allowed: a local folder, or a hub id"):
            resolve(bad)
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(tmp_path / "snapshot")
    )
    assert resolve("owner/name@v1") == tmp_path / "snapshot"
    (args, options) = calls[0]
    assert args == ("owner/name",) and options["revision"] == "v1"
    assert not any("bin" in p or p == "*" for p in options["allow_patterns"])


def test_resolve_offline_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no folder 'owner/name', and the hub gave no model") as e:
        resolve("owner/name")
    assert "\n" not in str(e.value)


def test_multimodal_names(tmp_path):
    model = tiny("gemma3")
    save_hf(model, tmp_path, dtype="float32")

    def wrap(tensors):
        for name in list(tensors):
            tensors["language_model." + name] = tensors.pop(name)
        tensors["vision_tower.x.weight"] = np.ones(2, np.float32)

    rewrite(tmp_path, wrap)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": raw}))
    back = load_hf(tmp_path)
    assert back.config == dataclasses.replace(model.config)
    same(back.params, model.params)

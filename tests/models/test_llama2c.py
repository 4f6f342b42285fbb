import struct

import jax
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import llama2c
from lowbit.models.llama2c import load_llama2c, save_llama2c
from tests.models.tiny import quantized, tiny
from tests.shared import shared_path

STORIES, BIT = "data/models/stories260K", "data/models/bit-llama2"


def nats_per_token(model, stories: int) -> float:
    """The convention `stories-256` of the published figures: BOS and at most 256 tokens of text, all text scored."""
    text = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_text()
    texts = [t for t in map(str.strip, text.split("<|endoftext|>")) if len(t) > 200][:stories]
    total, count = 0.0, 0
    for start in range(0, stories, 10):
        rows = [model.tokenizer.encode(t, bos=True)[:257] for t in texts[start : start + 10]]
        tokens = np.zeros((len(rows), 257), np.int32)
        for row, ids in zip(tokens, rows):
            row[: len(ids)] = ids
        logp = np.asarray(jax.nn.log_softmax(model.logits(tokens[:, :-1])))
        for lp, ids in zip(logp, rows):
            total -= float(lp[np.arange(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
    return total / count


@pytest.mark.parametrize(
    "path, expected",
    [
        (f"{STORIES}/stories260K.bin", 1.504),
        pytest.param(f"{BIT}/bit_model_3M.bin", 1.420, marks=pytest.mark.slow),
        pytest.param(f"{BIT}/bit_model_1M.bin", 1.557, marks=pytest.mark.slow),
    ],
)
def test_published_loss(path, expected):
    assert nats_per_token(load_llama2c(shared_path(path)), 60) == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
def test_q8_is_the_float_model_rounded():
    full = load_llama2c(shared_path(f"{STORIES}/stories260K.bin"))
    q8 = load_llama2c(shared_path(f"{STORIES}/stories260K-q8.bin"))
    assert q8.config == full.config and q8.meta == {"format": "llama2c-q8"}
    groups = set()
    for i in range(full.config.num_layers):
        for block in ("self_attn", "mlp"):
            for name, w in full.params["model"]["layers"][str(i)][block].items():
                q = q8.params["model"]["layers"][str(i)][block][name]
                assert isinstance(q, QTensor)
                groups.add(q.format.name)
                w = np.asarray(w)
                assert np.abs(np.asarray(q.decode()) - w).max() <= 0.51 / 127 * np.abs(w).max()
    assert groups == {"int8:g8:f32", "int8:g4:f32"}  # rows of 172 hold no groups of 8
    x = np.arange(1, 60)[None]
    want = np.asarray(full.logits(x))
    assert 1e-4 < np.linalg.norm(np.asarray(q8.logits(x)) - want) / np.linalg.norm(want) < 0.02


def test_bit_model_is_ternary_with_8_bit_inputs():
    model = load_llama2c(shared_path(f"{BIT}/bit_model_1M.bin"))
    assert model.config.num_params == 1_245_312
    leaf = model.params["model"]["layers"]["3"]["mlp"]["down_proj"]
    assert isinstance(leaf, PreparedInput) and leaf.w.format.name == "ternary:tensor:f32"
    assert np.unique(np.abs(np.asarray(leaf.w.decode()))).size == 2
    assert "down_proj.bias" not in model.params["model"]["layers"]["3"]["mlp"]


def write(path, config, version, arrays, group=0):
    dims = (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads)
    dims += (config.num_kv_heads, config.vocab_size, config.max_position)
    header = struct.pack("<Ii7iBi", llama2c.MAGIC, version, *dims, config.tied, group).ljust(256, b"\0")
    path.write_bytes(header + b"".join(a.tobytes() for a in arrays))


def interleaved(model, name):
    """The file's matrix of every layer, in its row order, by indexing: row 2i and 2i + 1 are halves' row i."""
    c, out = model.config, []
    for i in range(c.num_layers):
        block, leaf = name.split(".")
        w = np.asarray(model.params["model"]["layers"][str(i)][block][leaf], np.float32)
        if leaf in ("q_proj", "k_proj"):
            d = c.head_dim
            rows = [h * d + (j // 2 + (d // 2) * (j % 2)) for h in range(len(w) // d) for j in range(d)]
            w = w[rows]
        out.append(w)
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_v0_round_trip(tmp_path, tied):
    model = tiny(tied=tied)
    save_llama2c(model, tmp_path / "m.bin")
    back = load_llama2c(tmp_path / "m.bin")
    assert back.config == model.config and back.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


@pytest.mark.parametrize("tied", [True, False])
def test_v1(tmp_path, tied):
    model = tiny(tied=tied)
    m = model.params["model"]
    layers = [m["layers"][str(i)] for i in range(3)]
    arrays = [np.asarray(layer[n]) for n in ("input_layernorm", "post_attention_layernorm") for layer in layers]
    arrays += [np.asarray(m["norm"]), np.asarray(m["embed_tokens"])]
    arrays += [w for name in llama2c.MATRICES for w in interleaved(model, name)]
    write(tmp_path / "m.bin", model.config, 1, arrays + ([] if tied else [np.asarray(model.params["lm_head"])]))
    back = load_llama2c(tmp_path / "m.bin")
    assert back.config == model.config and back.meta["format"] == "llama2c-v1"
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_tokenizer_beside():
    assert load_llama2c(shared_path(f"{STORIES}/stories260K.bin")).tokenizer.encode("Once", bos=True)[:1] == [1]


def saved(tmp_path):
    save_llama2c(tiny(), tmp_path / "m.bin")
    return (tmp_path / "m.bin").read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b[:-4], "is truncated or damaged: .*its header needs"),
        (lambda b: b + b"\0", "is truncated or damaged"),
        (lambda b: b[:20], "no llama2.c file: 20 bytes"),
        (lambda b: b"GGUF" + b[4:], "its header reads"),
        (lambda b: struct.pack("<Ii", llama2c.MAGIC, 3) + b[8:], "version 3 .allowed: 0, 1, 2"),
        (lambda b: b[:28] + b"\0\0\xc0\x7f" + b[32:], "model.embed_tokens holds NaN"),
    ],
)
def test_refusals(tmp_path, change, message):
    data = saved(tmp_path)
    (tmp_path / "bad.bin").write_bytes(change(data))
    with pytest.raises(InputError, match=message) as e:
        load_llama2c(tmp_path / "bad.bin")
    assert "\n" not in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no llama2.c file"):
        load_llama2c(tmp_path / "none.bin")


def test_group_that_does_not_divide(tmp_path):
    write(tmp_path / "m.bin", tiny().config, 2, [], group=7)
    with pytest.raises(InputError, match="group size 7"):
        load_llama2c(tmp_path / "m.bin")


@pytest.mark.parametrize("name, field", [("qwen3", "qk_norm"), ("llama3", "rope_scaling"), ("gemma2", "family")])
def test_save_refuses_what_the_file_cannot_say(tmp_path, name, field):
    with pytest.raises(InputError, match=field):
        save_llama2c(tiny(name), tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


def test_save_decodes_packed_weights(tmp_path):
    packed = quantized(tiny(), {"model.layers.1.self_attn.q_proj": "int4:g16"})
    save_llama2c(packed, tmp_path / "m.bin")
    back = load_llama2c(tmp_path / "m.bin")
    want = packed.params["model"]["layers"]["1"]["self_attn"]["q_proj"].decode()
    np.testing.assert_array_equal(back.params["model"]["layers"]["1"]["self_attn"]["q_proj"], want)
    x = np.arange(1, 30)
    np.testing.assert_allclose(back.logits(x), packed.logits(x), atol=2e-4)  # logits of 17, another order of sums

"""GGUF files: every family, type and tokenizer through the writer and back through the reader."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.data.tokenizer import Tokenizer, train_bpe
from lowbit.errors import InputError
from lowbit.export import gguf_arch
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_file import parse
from lowbit.export.gguf_read import read_gguf
from lowbit.formats.activation import get_act
from lowbit.formats.base import Latent, QTensor
from lowbit.formats.base import get as get_format
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.llama2c import load_llama2c
from tests.export.small_models import CASES, byte_model, config, model, packed, weights
from tests.shared import shared_path

TYPES = "Q4_0 Q8_0 Q4_1 Q2_0 TQ1_0 TQ2_0 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4".split()
TOKENS = np.random.default_rng(1).integers(0, 258, (1, 48))
TRICKY = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\ttab",
    "naïve café 你好 🙂",
    "I've 1234.5 don't",
    "<|endoftext|>",
]


def same_weights(a, b):
    for (p, x), (q, y) in zip(trees.items(a.params), trees.items(b.params), strict=True):
        assert p == q
        np.testing.assert_array_equal(weights(x), weights(y), err_msg=p)


@pytest.mark.parametrize("name", CASES)
def test_every_family_round_trips(name, tmp_path):
    m = byte_model(name)
    report = write_gguf(m, tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf")
    expected = m.config
    if name == "mistral":  # llama.cpp calls it llama and has no window for it: the context is cut to the window
        expected = dataclasses.replace(
            expected, family="llama", max_position=64, sliding_window=None, sliding_layers=()
        )
        assert "sliding window, 64" in report.notes[0]
    assert back.config == expected
    if not m.config.norm_plus_one:  # Gemma's 1 + w is what is stored
        same_weights(m, back)
    np.testing.assert_array_equal(np.asarray(m.logits(TOKENS)), np.asarray(back.logits(TOKENS)))


SLOW = "Q2_K Q3_K Q5_K Q6_K Q5_0 Q5_1 TQ1_0".split()  # searches that compile, and layouts that other tests cover


@pytest.mark.parametrize("type", [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in TYPES])
def test_packed_types_keep_codes_and_scales(type, tmp_path):
    m = packed(model(), type.lower())
    report = write_gguf(m, tmp_path / "m.gguf", type)
    assert not report.fresh and set(report.types.values()) == {type, "F32"}
    back = read_gguf(tmp_path / "m.gguf")
    for path, leaf in trees.items(m.params):
        other = trees.get(back.params, path)
        if isinstance(leaf, QTensor):
            assert other.format == leaf.format
            for k, a in leaf.arrays.items():
                np.testing.assert_array_equal(np.asarray(a), np.asarray(other.arrays[k]), err_msg=f"{path}.{k}")


def test_the_library_reads_our_file(tmp_path):
    m = packed(byte_model(), "q4_0")
    write_gguf(m, tmp_path / "m.gguf", "Q4_0")
    r = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in r.tensors}
    assert r.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert r.fields["llama.attention.head_count_kv"].contents() == 2
    assert len(r.fields["tokenizer.ggml.tokens"].contents()) == m.config.vocab_size
    q = tensors["blk.1.attn_q.weight"]
    w = gguf.dequantize(q.data, q.tensor_type)
    ours = weights(trees.get(m.params, "model.layers.1.self_attn.q_proj"))
    np.testing.assert_array_equal(w, gguf_arch.to_file_rows(ours, "model.layers.1.self_attn.q_proj", m.config))
    assert not np.array_equal(w, ours)


def test_float_types(tmp_path):
    m = model(dtype=jnp.bfloat16)
    assert set(write_gguf(m, tmp_path / "a.gguf").types.values()) == {"BF16", "F32"}
    same_weights(m, read_gguf(tmp_path / "a.gguf"))
    report = write_gguf(m, tmp_path / "b.gguf", "F16")
    assert set(report.types.values()) == {"F16", "F32"}
    changed = sum(report.rounded.values())  # bf16 values below fp16's subnormals
    assert 0 <= changed < 100
    big = m.replace(params=trees.map_leaves(lambda p, w: w * 1e6 if p.endswith("up_proj") else w, m.params))
    with pytest.raises(InputError, match=r"model.layers.0.mlp.up_proj holds .* beyond F16 \(allowed: BF16 or F32"):
        write_gguf(big, tmp_path / "c.gguf", "F16")
    assert not (tmp_path / "c.gguf").exists() and not list(tmp_path.glob(".*"))


def test_fresh_and_mixed(tmp_path):
    m = model(dtype=jnp.bfloat16)
    report = write_gguf(m, tmp_path / "a.gguf", "Q8_0", overrides=[(r".*\.1\.mlp\.down_proj", "BF16")])
    assert len(report.fresh) == 13 and report.types["model.layers.1.mlp.down_proj"] == "BF16"
    assert report.types["model.embed_tokens"] == report.types["lm_head"] == "BF16"
    planned = packed(m, "int4:g64", match=".layers.0.")
    report = write_gguf(planned, tmp_path / "b.gguf", "Q4_0")
    assert not report.fresh and report.types["model.layers.1.mlp.down_proj"] == "BF16"
    same_weights(planned, read_gguf(tmp_path / "b.gguf"))
    report = write_gguf(planned, tmp_path / "b.gguf", "Q4_0", embedding="Q8_0")
    assert report.fresh == ["model.embed_tokens", "lm_head"]


def test_a_packed_tied_embedding(tmp_path):
    m = packed(packed(model("qwen3"), "q8_0", match="embed_tokens"), "q4_0")
    report = write_gguf(m, tmp_path / "m.gguf", "Q4_0")
    assert report.types["model.embed_tokens"] == "Q8_0"
    same_weights(m, read_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name, type", [("int2:g64", "Q2_0"), ("q4_k:absmax", "Q4_K")])
def test_latents_give_their_trained_codes(name, type, tmp_path):
    m, fmt = model(num_layers=1), get_format(name)
    init = jax.jit(fmt.init)

    def latent(path, w):
        if w.ndim == 1 or ".layers." not in path:
            return w
        params = init(w)
        noise = np.random.default_rng(0).uniform(0.7, 1.7, w.shape)  # scales that init would not give
        return Latent(w, {k: v * noise[:, : v.shape[1]].astype("f4") for k, v in params.items()}, fmt)

    trained = m.replace(params=trees.map_leaves(latent, m.params))
    assert set(write_gguf(trained, tmp_path / "m.gguf").types.values()) == {type, "F32"}
    back = read_gguf(tmp_path / "m.gguf")
    for path, leaf in trees.items(trained.params):
        if isinstance(leaf, Latent):
            np.testing.assert_array_equal(np.asarray(leaf.value()), weights(trees.get(back.params, path)))


def test_activation_formats_are_refused_unless_dropped(tmp_path):
    m = packed(model(), "q8_0")
    path = "model.layers.0.mlp.up_proj"
    params = trees.map_leaves(lambda p, w: PreparedInput(w, get_act("int8:token")) if p == path else w, m.params)
    m = m.replace(params=params)
    with pytest.raises(InputError, match=f"{path} quantizes its input .*drop_activations"):
        write_gguf(m, tmp_path / "m.gguf")
    assert write_gguf(m, tmp_path / "m.gguf", drop_activations=True).types[path] == "Q8_0"


def test_misfits_are_named_up_front(tmp_path):
    m = model(intermediate_size=344, num_layers=1)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.down_proj \[256, 344\].* no multiple of TQ2_0's block"):
        write_gguf(m, tmp_path / "m.gguf", "TQ2_0")
    with pytest.raises(InputError, match=r"down_proj \[256, 344\].* no multiple of Q4_K's block of 256 \(allowed: F32"):
        write_gguf(m, tmp_path / "m.gguf", "Q4_K")
    with pytest.raises(InputError, match=r"q6_k.* and 11 more tensors: .*sub-blocks of 16 .* \(allowed: Q6_K, F32"):
        write_gguf(packed(model(), "q6_k:absmax"), tmp_path / "m.gguf", "Q4_K")
    with pytest.raises(InputError, match=r"int4:g64.* and 11 more tensors: .*Q2_0 holds -1..2\) \(allowed: Q4_0"):
        write_gguf(packed(model(), "int4:g64"), tmp_path / "m.gguf", "Q2_0")
    with pytest.raises(InputError, match="override 'nothing' matches no tensor"):
        write_gguf(m, tmp_path / "m.gguf", overrides=[("nothing", "F32")])
    assert not list(tmp_path.iterdir())


REFUSED = [
    ("llama", dict(activation="relu2"), "activation relu2"),
    ("llama", dict(input_norm=False), "input_norm False"),
    ("llama", dict(query_scale=0.5), "query_scale 0.5"),
    ("qwen2", dict(head_dim=32), "head_dim 32"),
    ("qwen2", dict(rope_scaling=CASES["llama3-rope"]["rope_scaling"]), "rope scaling"),
    ("qwen3", dict(o_bias=True), "o_bias True"),
    ("gemma2", dict(attn_softcap=None), "softcaps None"),
    ("gemma2", dict(query_scale=24**-0.5), "query_scale 0.2041"),
    ("gemma2", dict(tied=False), "tied False"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(name, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        gguf_arch.check(config(name, **changes))


TOKENIZERS = {
    "bpe": lambda: train_bpe(["the quick brown fox " * 20, "don't 123 é"], 275),
    "bytes": lambda: byte_model().tokenizer,
    "spm": lambda: Tokenizer.from_llama2c(shared_path("data/models/stories260K/tok512.bin")),
    "gpt2": lambda: Tokenizer.from_tokenizer_json(shared_path("data/tokenizers/gpt2/tokenizer.json").read_text()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_round_trip(kind, tmp_path):
    tok = TOKENIZERS[kind]()
    m = model(tokenizer=tok, vocab_size=tok.vocab_size + 3, hidden_size=64, num_layers=1)
    write_gguf(m, tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf").tokenizer
    assert (back.bos_id, back.eos_ids, back.adds_bos) == (tok.bos_id, tok.eos_ids, tok.adds_bos)
    for text in TRICKY:
        ids = tok.encode(text)
        assert back.encode(text) == ids, text
        assert back.decode(ids) == tok.decode(ids)


def test_unnamed_pre_tokenizer_is_refused(tmp_path):
    state = json.loads(byte_model().tokenizer.tok.to_str())
    state["pre_tokenizer"]["add_prefix_space"] = True
    odd = Tokenizer.from_tokenizer_json(json.dumps(state))
    m = model(tokenizer=odd, hidden_size=64, num_layers=1)
    with pytest.raises(InputError, match="pre-tokenizer that llama.cpp has no name for"):
        write_gguf(m, tmp_path / "m.gguf")


def test_third_party_file():
    """Published by others, unpermuted in Hugging Face's sense: its rows are interleaved as llama.cpp wants them."""
    ours = load_llama2c(shared_path("data/models/stories260K/stories260K.bin"))
    theirs = read_gguf(shared_path("data/models/stories260K/stories260Ktok512.gguf"))
    ids = ours.tokenizer.encode("Once upon a time, there was a little girl.")
    assert theirs.tokenizer.encode("Once upon a time, there was a little girl.") == ids
    np.testing.assert_array_equal(np.asarray(ours.logits(ids)), np.asarray(theirs.logits(ids)))


def test_tensors_are_aligned(tmp_path):
    write_gguf(packed(model(), "tq1_0"), tmp_path / "m.gguf")
    f = parse(tmp_path / "m.gguf")
    assert all(t.offset % 32 == 0 for t in f.tensors.values())
    assert f.kv["general.quantization_version"] == 2 and f.kv["general.file_type"] == 36

"""llama.cpp runs our files: logits, weights, greedy continuations and token ids (needs llama-cpp-python).

llama.cpp multiplies quantized weights with activations rounded to 8 bits, so logits of quantized files are compared to
2e-3 nats; the weights are compared exactly, through ggml's own dequantizers.
"""

import ctypes
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.data.tokenizer import Tokenizer, train_bpe
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_arch import tensor_names, to_file_rows
from lowbit.export.gguf_file import parse
from lowbit.export.gguf_read import read_gguf
from lowbit.formats.base import QTensor
from lowbit.models.llama2c import load_llama2c
from tests.export.small_models import CASES, byte_model, model, packed
from tests.shared import ROOT, shared_path

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.llamacpp, pytest.mark.filterwarnings("ignore")]

FLOAT_KL, QUANTIZED_KL = 1e-4, 2e-3  # nats per token, mean
TYPES = "Q8_0 Q4_0 Q4_1 Q2_0 TQ1_0 TQ2_0 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4".split()
GAP = 0.05  # nats between the two likeliest tokens below which a greedy choice may differ


def run(path: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits `[T, V]`."""
    lm = llama_cpp.Llama(str(path), logits_all=True, n_ctx=256, n_threads=2, verbose=False)
    lm.eval([int(t) for t in tokens])
    return np.array(lm.scores[: len(tokens)])


def kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (theirs, ours))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


def tokens(m, n=48) -> list[int]:
    return np.random.default_rng(1).integers(0, min(m.config.vocab_size, 258), n).tolist()


@pytest.mark.parametrize("name, type", [*((n, t) for n in CASES for t in ("F32", "F16")), ("llama", "BF16")])
def test_float_logits(name, type, tmp_path):
    m = byte_model(name)
    write_gguf(m, tmp_path / "m.gguf", type)
    ids = tokens(m)
    ours = np.asarray(read_gguf(tmp_path / "m.gguf").logits(ids))
    got = kl(run(tmp_path / "m.gguf", ids), ours)
    print(f"{name} {type}: KL {got:.2e}, logits std {ours.std():.2f}")
    assert ours.std() > 0.5 and got <= FLOAT_KL


def test_the_limit_would_notice_a_missing_permutation(tmp_path, monkeypatch):
    m = model()
    monkeypatch.setattr("lowbit.export.gguf.arch.to_file_rows", lambda x, path, c: x)
    write_gguf(m, tmp_path / "m.gguf", "F32")
    ids = tokens(m)
    assert kl(run(tmp_path / "m.gguf", ids), np.asarray(m.logits(ids))) > 10 * QUANTIZED_KL


OTHERS = [(n, t) for n in ("qwen2", "qwen3", "gemma2", "gemma3") for t in ("Q4_0", "Q2_0", "TQ2_0")]


@pytest.mark.parametrize("name, type", [*(("llama", t) for t in TYPES), *OTHERS])
def test_quantized_logits(name, type, tmp_path):
    m = packed(byte_model(name), type.lower())
    write_gguf(m, tmp_path / "m.gguf", type)
    ids = tokens(m)
    got = kl(run(tmp_path / "m.gguf", ids), np.asarray(m.logits(ids)))
    print(f"{name} {type}: KL {got:.2e}")
    assert got <= QUANTIZED_KL


@pytest.mark.parametrize("format, type", [("int4:g64", "Q4_0"), ("int2:g64", "Q2_0"), ("ternary:tensor", "TQ2_0")])
def test_formats_that_are_not_ggml_s(format, type, tmp_path):
    m = packed(byte_model(), format)
    write_gguf(m, tmp_path / "m.gguf", type)
    ids = tokens(m)
    assert kl(run(tmp_path / "m.gguf", ids), np.asarray(m.logits(ids))) <= QUANTIZED_KL


def test_a_mixed_file(tmp_path):
    m = packed(packed(byte_model(dtype=jnp.bfloat16), "q4_0", match=".layers.0."), "q8_0", match="embed_tokens")
    write_gguf(m, tmp_path / "m.gguf", overrides=[(r".*layers\.1\.mlp.*", "F16")])
    kinds = {t.type.name for t in parse(tmp_path / "m.gguf").tensors.values()}
    assert kinds == {"Q4_0", "Q8_0", "BF16", "F16", "F32"}
    ids = tokens(m)
    assert kl(run(tmp_path / "m.gguf", ids), np.asarray(m.logits(ids))) <= QUANTIZED_KL


@pytest.mark.parametrize("type", TYPES)
def test_ggml_decodes_our_bytes_to_our_weights(type, tmp_path):
    folder = Path(llama_cpp.__file__).parent / "lib"
    lib = ctypes.CDLL(str(folder / "libggml-base.so"))
    decode = getattr(lib, "dequantize_row_" + type.lower().replace("_k", "_K"))
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    m = packed(model(), type.lower() + ":absmax" * type.endswith("_K"))
    write_gguf(m, tmp_path / "m.gguf", type)
    f, names, checked = parse(tmp_path / "m.gguf"), tensor_names(m.config), 0
    for path, leaf in trees.items(m.params):
        if isinstance(leaf, QTensor):
            data = np.ascontiguousarray(f.read(names[path]))
            w = np.empty(leaf.shape, np.float32)
            decode(data.ctypes.data, w.ctypes.data, w.size)
            np.testing.assert_array_equal(w, to_file_rows(np.asarray(leaf.decode()), path, m.config), err_msg=path)
            checked += 1
    assert checked == 14


# -- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [
    "Once upon a time", "Lily and Tom went to the park.", "The little dog was sad because", "One day, a bird",
    "Mom said", "There was a big red ball", "In the forest lived", "\"Hello,\" said the",
]  # fmt: skip


def same_continuations(m, path: Path, steps: int = 64) -> list[int]:
    """Greedy steps that were compared for each prompt; asserts that the tokens agree until a near tie."""
    lm = llama_cpp.Llama(str(path), logits_all=True, n_ctx=256, n_threads=2, verbose=False)
    compared = []
    for prompt in PROMPTS:
        ids = m.tokenizer.encode(prompt)
        assert lm.tokenize(prompt.encode(), add_bos=True, special=True) == ids
        lm.reset()
        lm.eval(ids)
        n = 0
        for n in range(steps):
            padded = np.zeros(96, np.int32)
            padded[: len(ids)] = ids
            ours = np.asarray(m.logits(padded))[len(ids) - 1]
            top = np.sort(ours)[-2:]
            if top[1] - top[0] < GAP:
                break
            choice = int(ours.argmax())
            assert choice == int(np.argmax(lm.scores[lm.n_tokens - 1])), f"{prompt!r}, step {n}"
            ids.append(choice)
            lm.eval([choice])
        compared.append(n + 1)
    return compared


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0"])
def test_stories260k(type, tmp_path):
    """Its ffn width of 172 fits no block of 32, so down_proj stays F16 where a type has blocks."""
    m = load_llama2c(shared_path("data/models/stories260K/stories260K.bin"))
    overrides = [(r".*down_proj", "F16")] if type == "Q8_0" else []
    write_gguf(m, tmp_path / "m.gguf", type, overrides=overrides)
    back = read_gguf(tmp_path / "m.gguf")
    ids = m.tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to play outside.")
    got = kl(run(tmp_path / "m.gguf", ids), np.asarray(back.logits(ids)))
    compared = same_continuations(back, tmp_path / "m.gguf")
    print(f"stories260K {type}: KL {got:.2e}, greedy steps compared {compared}")
    assert got <= (QUANTIZED_KL if type == "Q8_0" else FLOAT_KL)
    assert sum(compared) >= 60


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q4_0", "Q2_0", "TQ2_0"])
def test_the_base_model(type, tmp_path):
    folder = ROOT / "lowbit" / "assets" / "lowbit-base"
    from lowbit.models.hf import load_hf

    m = load_hf(folder)
    write_gguf(m, tmp_path / "m.gguf", type)
    back = read_gguf(tmp_path / "m.gguf")
    ids = m.tokenizer.encode("def main():\n    return 1\n\nIt was the best of times, it was the worst of times.")
    got = kl(run(tmp_path / "m.gguf", ids), np.asarray(back.logits(ids)))
    compared = same_continuations(back, tmp_path / "m.gguf")
    print(f"lowbit-base {type}: KL {got:.2e}, greedy steps compared {compared}")
    assert got <= (FLOAT_KL if type in ("F32", "F16") else QUANTIZED_KL)


# -- tokens -----------------------------------------------------------------------------------------------------------

TRICKY = [
    "", "a", " a", "Hello, world!", "I've don't WE'LL 'tis", "1234567 3.14 1,000", "tab\there", "line\n\nline\r\n",
    "naïve café", "你好，世界", "🙂👩‍👩‍👧", "\u200b\u00a0x", "def f(x):\n        return x**2  # ok\n", "<|endoftext|>",
    "<|begin|>x<|endoftext|>y", "</s> <s> <unk>", "▁lower", "a" * 100, "ÅÄÖ ẞ ﬁ", "x\u0301", "\x00\x7f",
]  # fmt: skip


def bpe() -> Tokenizer:
    text = "the quick brown fox jumps over the lazy dog, don't you know? 1234 def return café " * 3
    return train_bpe([text], 300)


TOKENIZERS = {
    "bpe": bpe,
    "bytes": lambda: byte_model().tokenizer,
    "gpt2": lambda: Tokenizer.from_tokenizer_json(shared_path("data/tokenizers/gpt2/tokenizer.json").read_text()),
    "spm": lambda: Tokenizer.from_llama2c(shared_path("data/models/stories260K/tok512.bin"), collapse_spaces=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids(kind, tmp_path):
    tok = TOKENIZERS[kind]()
    m = model(tokenizer=tok, vocab_size=tok.vocab_size, hidden_size=64, num_layers=1)
    write_gguf(m, tmp_path / "m.gguf")
    lm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert lm.token_bos() == (tok.bos_id if tok.bos_id is not None else lm.token_bos())
    assert lm.token_eos() == (tok.eos_ids[0] if tok.eos_ids else lm.token_eos())
    special = kind != "spm"  # sentencepiece does not look for control tokens in text
    strings = TRICKY + ([] if kind == "gpt2" else [f"  two  spaces and {i} more   " for i in range(2)])
    for text in strings:
        if "\x00" in text and kind == "spm":
            continue
        assert lm.tokenize(text.encode(), add_bos=True, special=special) == tok.encode(text), repr(text)
        without = lm.tokenize(text.encode(), add_bos=False, special=special)
        assert without == tok.encode(text, bos=False), repr(text)

"""Tokenizers: against SentencePiece, against llama.cpp's vectors, round trips through files, and refusals."""

import json
import struct

import pytest

from lowbit.data import spm
from lowbit.data.tokenizer import ByteTokenizer, SpmTokenizer, Tokenizer, train_bpe
from lowbit.errors import InputError
from tests.shared import shared_path

TEXTS = [
    "",
    " ",
    "Hello world",
    "  a  b   c ",
    "héllo wörld, naïve",
    "😀 emoji 👩‍👩‍👧 and 日本語",
    "tabs\tand\n\nlines\r\n",
    "Once upon a time, there was a little girl named Lily. " * 3,
    "x" * 300,
    "123 4567,89.0",
]
LEARN = ["the cat sat on the mat, the dog ran to the cat. " * 20, "def f(x):\n    return x + 1\n" * 20]


def spm_tokenizer(collapse: bool = False, prefix: bool = True, user: str | None = None) -> Tokenizer:
    words = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "▁", "t", "h", "e", "c", "a", "▁▁", "aa", "aaa"]
    pieces = ["<unk>", "<s>", "</s>"] + [spm.byte_piece(b) for b in range(256)] + words
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    if user:
        pieces.append(user)
        types.append(4)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    return Tokenizer.from_spm_pieces(pieces, scores, types, add_space_prefix=prefix, collapse_spaces=collapse)


# -- byte level -------------------------------------------------------------------------------------------------------


def test_bytes():
    t = ByteTokenizer()
    assert t.vocab_size == 258 and t.encode("hé") == [256, 104, 195, 169]
    assert t.encode("hé", bos=False) == list("hé".encode())
    for text in TEXTS:
        assert t.decode(t.encode(text)) == text
    assert t.decode([0xFF, 104]) == "\ufffdh"
    assert t.token_bytes.tolist() == [1] * 256 + [0, 0]


def test_trained_bpe_is_lossless_deterministic_and_compresses(tmp_path):
    t = train_bpe(LEARN, 285)
    assert t.vocab_size == 285 and (t.bos_id, t.eos_ids, t.adds_bos) == (0, (1,), True)
    assert train_bpe(iter(LEARN), 285).hash == t.hash
    for text in TEXTS + LEARN:
        ids = t.encode(text)
        assert ids[0] == 0 and t.decode(ids) == text
        assert t.token_bytes[ids].sum() == len(text.encode())
    assert len(t.encode(LEARN[0])) < len(LEARN[0]) / 2
    one = train_bpe(LEARN, 280, special=["<|endoftext|>"])
    assert one.bos_id == 0 and one.eos_ids == (0,)


@pytest.mark.parametrize(
    ("size", "special", "says"),
    [(257, ["<s>", "</s>"], "at least 258"), (300, [], "1 or more"), (9000, ["<s>"], "more text")],
)
def test_bpe_refusals(size, special, says):
    with pytest.raises(InputError, match=says):
        train_bpe(LEARN, size, special)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(LEARN, 285), spm_tokenizer])
def test_saved_and_read_again(tmp_path, make):
    t = make()
    t.save(tmp_path)
    again = Tokenizer.from_dir(tmp_path)
    assert (again.vocab_size, again.bos_id, again.eos_ids, again.adds_bos) == (
        t.vocab_size,
        t.bos_id,
        t.eos_ids,
        t.adds_bos,
    )
    for text in TEXTS + ["the cat", "the  cat aaaa"]:
        assert again.encode(text) == t.encode(text)
        assert again.decode(again.encode(text)) == text
    assert (again.token_bytes == t.token_bytes).all()
    before = t.pieces(), again.pieces()
    assert before[0].tokens == before[1].tokens and before[0].types == before[1].types
    again.save(tmp_path / "twice")
    assert Tokenizer.from_dir(tmp_path / "twice").hash == again.hash


def test_configuration_decides_bos_and_eos(tmp_path):
    train_bpe(LEARN, 285).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    t = Tokenizer.from_dir(tmp_path)
    assert not t.adds_bos and t.eos_ids == (1, 7) and t.encode("the") == t.encode("the", bos=True)[1:]
    config = {"bos_token": None, "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="BOS asked for"):
        Tokenizer.from_dir(tmp_path).encode("x", bos=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<none>"}))
    with pytest.raises(InputError, match="'<none>' is no token"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # then the post-processor says what starts a text
    assert Tokenizer.from_dir(tmp_path).bos_id == 0 and Tokenizer.from_dir(tmp_path).adds_bos


def test_special_tokens_in_text_are_special_for_tokenizer_json():
    t = train_bpe(LEARN, 285)
    assert t.encode("the<|endoftext|>cat", bos=False).count(1) == 1
    assert t.decode(t.encode("a<|endoftext|>b")) == "ab"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": b"{"}, "cannot read"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "is no JSON"),
        ({"tokenizer.model": b"\x0a\xff"}, "corrupt"),
        ({"tokenizer.model": b""}, "no pieces"),
    ],
)
def test_bad_folders(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as e:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(e.value)


# -- SentencePiece ----------------------------------------------------------------------------------------------------


def test_merges_take_the_best_score_then_the_leftmost():
    t = spm_tokenizer()
    name = lambda text: [t.pieces().tokens[i] for i in t.encode(text, bos=False)]  # noqa: E731
    assert name("the cat") == ["▁the", "▁cat"]
    assert name("  the") == ["▁▁", "▁the"]
    assert name("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert spm_tokenizer(prefix=False).encode("cat", bos=False) == [t.pieces().tokens.index(p) for p in ("c", "at")]
    # "aa" beats "aaa"; of the two ways to join, the left one
    assert name("aaaaa") == ["▁", "aa", "aaa"]


def test_collapsing_and_user_defined_pieces():
    assert spm_tokenizer(collapse=True).encode("  the   cat ") == spm_tokenizer().encode("the cat")
    t = spm_tokenizer(user="theca")
    assert t.decode(t.encode("a thecat")) == "a thecat"
    assert t.encode("thecat", bos=False)[1] == t.vocab_size - 1


def test_spm_refusals(tmp_path):
    with pytest.raises(InputError, match="equal counts"):
        Tokenizer.from_spm_pieces(["a"], [0.0, 1.0], [1])
    with pytest.raises(InputError, match="no byte piece"):
        Tokenizer.from_spm_pieces(["a"], [0.0], [1])
    good = struct.pack("<i", 6) + b"".join(
        struct.pack("<fi", 0.0, len(p)) + p.encode()
        for p in ["<unk>", "\n<s>\n", "\n</s>\n", *map(spm.byte_piece, range(256))]
    )
    path = tmp_path / "tok.bin"
    path.write_bytes(good)
    assert Tokenizer.from_llama2c(path).encode("a") == [1, 3 + 0xE2, 3 + 0x96, 3 + 0x81, 3 + 97]
    for data, says in [
        (good[:-1], "length 6"),
        (good[: len(good) - 8], "cut off"),
        (good[:400], "pieces without bytes|length|cut off"),
        (b"", "0 pieces"),
        (struct.pack("<ifi", 1, 0.0, 1) + b"\xff", "no UTF-8"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=says):
            Tokenizer.from_llama2c(path)
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer.from_llama2c(tmp_path / "none.bin")


def test_llama2c_equals_sentencepiece():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = shared_path("data/models/bit-llama2/tok512.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    t = Tokenizer.from_llama2c(shared_path("data/models/bit-llama2/tok512.bin"))
    assert isinstance(t, SpmTokenizer) and Tokenizer.from_sentencepiece(model).hash == t.hash
    story = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_text()[:15_000]
    moby = shared_path("data/corpora/public_domain/mobydick.txt").read_text()[:10_000]
    for text in [*TEXTS, "a▁b", "▁▁", " a▁ ", "literal <s> <0x0A> </s>", story, moby]:
        ids = t.encode(text, bos=False)
        assert ids == reference.encode(text)
        assert t.decode(ids) == reference.decode(ids)


# -- real vocabularies ------------------------------------------------------------------------------------------------


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's own test vectors of a vocabulary: texts and their ids without BOS."""
    base = "data/tokenizers/ggml-vocab/ggml-vocab-" + name + ".gguf"
    texts = shared_path(base + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = shared_path(base + ".out").read_text().split("\n")
    ids = [[int(i) for i in line.split()] for line in lines]
    assert len(ids) - 1 <= len(texts) <= len(ids)
    return list(zip(texts, ids))


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_llama_cpp_vectors_spm(name):
    import gguf

    fields = gguf.GGUFReader(shared_path(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf")).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "scores", "token_type"))
    t = Tokenizer.from_spm_pieces(tokens, scores, types)
    tested = vectors(name)
    assert len(tested) > 40
    for text, ids in tested:
        assert t.encode(text, bos=False) == ids, text


def test_llama_cpp_vectors_gpt2():
    t = Tokenizer.from_tokenizer_json(shared_path("data/tokenizers/gpt2/tokenizer.json").read_text())
    assert t.eos_ids == (50256,) and not t.adds_bos and t.pieces().pre == "gpt-2"
    for text, ids in vectors("gpt-2"):
        assert t.encode(text) == ids, text


def test_mistral_as_pieces_is_the_same_tokenizer():
    t = Tokenizer.from_tokenizer_json(shared_path("data/tokenizers/mistral-7b-v0.3/tokenizer.json").read_text())
    assert (t.bos_id, t.eos_ids, t.adds_bos) == (1, (2,), True)
    p = t.pieces()
    assert p.model == "llama" and p.add_space_prefix
    same = Tokenizer.from_spm_pieces(p.tokens, p.scores, p.types)
    wiki = shared_path("data/corpora/wikitext-2/wiki.test.raw").read_text()[:10_000]
    # Before a text that starts with a space, Hugging Face's Metaspace puts no second one; SentencePiece does.
    for text in [*(x for x in TEXTS if x.strip() and x[0] != " "), wiki.lstrip()]:
        assert same.encode(text) == t.encode(text)
        assert t.decode(t.encode(text)) == text
    ids = t.encode(wiki.lstrip())
    assert t.token_bytes[ids].sum() == len(wiki.lstrip().encode()) + 1  # the space put in front


def test_gpt_neox_round_trip(tmp_path):
    t = Tokenizer.from_tokenizer_json(shared_path("data/tokenizers/gpt-neox-20b/20B_tokenizer.json").read_text())
    t.save(tmp_path)
    again = Tokenizer.from_dir(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == t.encode(text)
        assert again.decode(again.encode(text)) == text
    p = t.pieces(size=50432)
    assert p.model == "gpt2" and len(p.tokens) == len(p.types) == 50432 and p.tokens[-1] == "[PAD50431]"
    with pytest.raises(InputError, match="vocabulary of 100"):
        t.pieces(size=100)


@pytest.mark.transformers
@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(LEARN, 285), spm_tokenizer])
def test_transformers_reads_what_we_save(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    t = make()
    t.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[1:]:
        assert theirs(text)["input_ids"] == t.encode(text)
        assert theirs.decode(t.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False) == text

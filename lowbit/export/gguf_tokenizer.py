"""Vocabularies in GGUF metadata, both ways: SentencePiece tables (`llama`) and byte-level BPE (`gpt2`)."""

import json
from collections.abc import Mapping
from typing import Any

from lowbit.data.tokenizer import Tokenizer
from lowbit.errors import InputError, unknown
from lowbit.models.config import ModelConfig

K = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _split(regex: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        _byte_level(False),
    ]


# What llama.cpp's pre-tokenizer names mean, as `tokenizers` says it.
_PRE_STEPS = {
    "gpt-2": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "qwen2": _split(_WORDS + _REST),
    "llama-bpe": _split(_WORDS + "{1,3}" + _REST),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def tokenizer_metadata(tok: Any, c: ModelConfig) -> dict[str, Any]:
    """Keys of a tokenizer (`lowbit.data.tokenizer`), or of none at all. Raises `InputError` for one that llama.cpp
    would split differently."""
    bos = c.bos_token_id if tok is None else tok.bos_id
    eos = c.eos_token_ids if tok is None else tok.eos_ids
    out: dict[str, Any] = {}
    if bos is not None:
        out[K + "bos_token_id"] = int(bos)
    for key, i in zip(("eos_token_id", "eot_token_id"), eos):
        out[K + key] = int(i)
    if tok is None:
        return {K + "model": "none"} | out
    p = tok.pieces(c.vocab_size)
    if p.model == "gpt2" and p.pre is None:
        raise InputError(
            f"tokenizer with a pre-tokenizer that llama.cpp has no name for (allowed: {', '.join(_PRE_STEPS)})"
        )
    out |= {K + "model": p.model, K + "tokens": p.tokens, K + "token_type": p.types}
    out |= {K + "add_bos_token": bool(tok.adds_bos), K + "add_eos_token": False}
    if p.model == "llama":
        out |= {K + "scores": p.scores, K + "add_space_prefix": p.add_space_prefix, K + "pre": "default"}
        out[K + "remove_extra_whitespaces"] = p.collapse_spaces
        if 2 in p.types:
            out[K + "unknown_token_id"] = p.types.index(2)
    else:
        out |= {K + "pre": p.pre, K + "merges": p.merges}
    return out


def read_tokenizer(kv: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that metadata describes, None where a file has none. Raises `InputError`."""
    kind = kv.get(K + "model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2"):
        raise unknown("GGUF tokenizer model", kind, ("llama", "gpt2", "none"))

    def need(key: str) -> Any:
        if K + key not in kv:
            raise InputError(f"GGUF file has no {K}{key} (needed for a tokenizer of model {kind!r})")
        return kv[K + key]

    tokens = need("tokens")
    bos = kv.get(K + "bos_token_id", 1 if kind == "llama" else None)
    eos = [kv[K + k] for k in ("eos_token_id", "eot_token_id") if K + k in kv] or ([2] if kind == "llama" else [])
    wrong = [i for i in (bos, *eos) if i is not None and not 0 <= i < len(tokens)]
    if wrong:
        raise InputError(f"GGUF file: special token {wrong[0]} (allowed: 0 to {len(tokens) - 1})")
    pre = kv.get(K + "pre")
    pre = _ALIASES.get(pre, pre)
    if kind == "llama":
        types = kv.get(K + "token_type") or [1] * len(tokens)
        return Tokenizer.from_spm_pieces(
            tokens,
            need("scores"),
            types,
            bos,
            eos,
            bool(kv.get(K + "add_bos_token", True)),
            bool(kv.get(K + "add_space_prefix", True)),
            bool(kv.get(K + "remove_extra_whitespaces", False)),
        )
    if pre not in _PRE_STEPS:
        raise unknown("GGUF pre-tokenizer", pre, _PRE_STEPS)
    return _read_bpe(kv, tokens, need("merges"), pre, bos, eos)


def _read_bpe(
    kv: Mapping[str, Any], tokens: list[str], merges: list[str], pre: str, bos: int | None, eos: list[int]
) -> Tokenizer:
    types = kv.get(K + "token_type") or [1] * len(tokens)
    vocab = dict(zip(tokens, range(len(tokens))))
    added = [
        {
            "id": i,
            "content": t,
            "special": kind == _CONTROL,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (t, kind) in enumerate(zip(tokens, types))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_STEPS[pre]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": [m for m in merges if _known(m, vocab)],
        },
    }
    config = {"add_bos_token": bool(kv.get(K + "add_bos_token", pre == "llama-bpe"))}
    config |= {"bos_token": None if bos is None else tokens[bos], "eos_token": tokens[eos[0]] if eos else None}
    return Tokenizer.from_tokenizer_json(json.dumps(state), config, eos, "the GGUF file's vocabulary")


def _known(merge: str, vocab: Mapping[str, int]) -> bool:
    """Whether a merge makes a token; the placeholder of a vocabulary without merges does not."""
    left, _, right = merge.partition(" ")
    return left in vocab and right in vocab and left + right in vocab

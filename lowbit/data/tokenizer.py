"""Tokenizers behind one face: Hugging Face `tokenizer.json`, SentencePiece BPE (also llama2.c's and GGUF's), bytes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowbit.data import spm
from lowbit.data.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel
from lowbit.errors import InputError
from lowbit.files import write_text

BOS, EOS = "<|begin|>", "<|endoftext|>"

# The llama.cpp name of a pre-tokenizer, by the regular expressions of its splits.
_GPT2_WORDS = "gpt-2"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {
    (_GPT2_WORDS,): "gpt-2",
    ("digits", _GPT2_WORDS): "smollm",
    (_CONTRACTIONS + r"\p{N}" + _PUNCTUATION,): "qwen2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _PUNCTUATION,): "llama-bpe",
}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A vocabulary as a GGUF file holds it.

    `model` is `llama` (SentencePiece: scores decide) or `gpt2` (byte-level: `merges` decide, tokens are spelt in
    GPT-2's byte alphabet). `types` are 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. `pre` is the
    name that llama.cpp has for the pre-tokenizer of a `gpt2` vocabulary, None if it has none.
    """

    model: Literal["llama", "gpt2"]
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    pre: str | None
    add_space_prefix: bool
    collapse_spaces: bool = False


class Tokenizer:
    """Text to ids and back. `adds_bos` says whether a text starts with BOS by default."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool

    # -- constructors ---------------------------------------------------------------------------------------------

    @staticmethod
    def from_dir(folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder: `tokenizer.json`, else a SentencePiece `tokenizer.model`."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json") or {}
        if (folder / "tokenizer.json").is_file():
            text = _read_text(folder / "tokenizer.json")
            ids = _eos_ids(folder)
            return Tokenizer.from_tokenizer_json(text, config, ids, str(folder / "tokenizer.json"))
        if (folder / "tokenizer.model").is_file():
            tok = Tokenizer.from_sentencepiece(folder / "tokenizer.model")
            tok.adds_bos = bool(config.get("add_bos_token", True)) and tok.bos_id is not None
            return tok
        raise InputError(f"{folder} has no tokenizer (allowed: tokenizer.json or tokenizer.model)")

    @staticmethod
    def from_tokenizer_json(
        text: str, config: dict[str, Any] | None = None, eos_ids: Sequence[int] = (), source: str = "tokenizer.json"
    ) -> "Tokenizer":
        """From the contents of `tokenizer.json` and, if there is one, of `tokenizer_config.json`."""
        try:
            tok = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises plain Exception for everything
            raise InputError(f"cannot read {source}: {str(e).splitlines()[0]} (allowed: a tokenizers JSON)") from e
        return HfTokenizer(tok, config or {}, eos_ids)

    @staticmethod
    def from_llama2c(path: str | Path, collapse_spaces: bool | None = None) -> "Tokenizer":
        """llama2.c's `tokenizer.bin`; see `spm.read_llama2c` for `collapse_spaces`."""
        return SpmTokenizer(spm.read_llama2c(path, collapse_spaces), 1, (2,), True)

    @staticmethod
    def from_sentencepiece(path: str | Path) -> "Tokenizer":
        """A SentencePiece BPE `.model` file (the library is not needed)."""
        model, bos, eos = spm.read_model(path)
        return SpmTokenizer(model, bos if bos >= 0 else None, eos, bos >= 0)

    @staticmethod
    def from_spm_pieces(
        pieces: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        bos_id: int | None = 1,
        eos_ids: Sequence[int] = (2,),
        adds_bos: bool = True,
        add_space_prefix: bool = True,
        collapse_spaces: bool = False,
    ) -> "Tokenizer":
        """From a table with U+2581 for the space, as a GGUF file of tokenizer model `llama` holds it."""
        model = SpmModel(
            tuple(pieces), tuple(map(float, scores)), tuple(map(int, types)), add_space_prefix, collapse_spaces
        )
        return SpmTokenizer(model, bos_id, tuple(eos_ids), adds_bos)

    # -- what a tokenizer does ------------------------------------------------------------------------------------

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a text. `bos` puts BOS in front, or not; by default as `adds_bos` says.

        Raises `InputError` if BOS is asked for and there is none.
        """
        return self._bos(bos) + self._encode([text])[0]

    def encode_many(self, texts: Sequence[str], bos: bool | None = None) -> list[list[int]]:
        """`encode` of each text, in parallel where the tokenizer can."""
        return [self._bos(bos) + ids for ids in self._encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens are left out, invalid UTF-8 becomes U+FFFD."""
        raise TypeError(type(self).__name__)

    def pieces(self, size: int | None = None) -> Pieces:
        """The vocabulary for a GGUF file, padded with unused tokens to `size` (the model's vocabulary)."""
        raise TypeError(type(self).__name__)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers` and `from_dir` read."""
        raise TypeError(type(self).__name__)

    def piece_bytes(self, i: int) -> bytes:
        """The bytes of text that token `i` stands for; none for control tokens."""
        raise TypeError(type(self).__name__)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 `[vocab_size]`: `len(piece_bytes(i))`, for bits per byte."""
        return np.array([len(self.piece_bytes(i)) for i in range(self.vocab_size)], np.int32)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides the ids."""
        state = [self._state(), self.bos_id, self.eos_ids, self.adds_bos]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise TypeError(type(self).__name__)

    def _state(self) -> Any:
        raise TypeError(type(self).__name__)

    def _bos(self, bos: bool | None) -> list[int]:
        if not (self.adds_bos if bos is None else bos):
            return []
        if self.bos_id is None:
            raise InputError("BOS asked for, but the tokenizer has none (allowed: bos=False)")
        return [self.bos_id]


class SpmTokenizer(Tokenizer):
    """SentencePiece BPE in pure Python (see `lowbit.data.spm`)."""

    def __init__(self, model: SpmModel, bos_id: int | None, eos_ids: tuple[int, ...], adds_bos: bool):
        self.model, self.bos_id, self.eos_ids = model, bos_id, eos_ids
        self.adds_bos = adds_bos and bos_id is not None
        self.vocab_size = len(model.pieces)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self.model.encode(t) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids))

    def piece_bytes(self, i: int) -> bytes:
        return self.model.piece_bytes(i)

    def _state(self) -> Any:
        return dataclasses.asdict(self.model)

    def pieces(self, size: int | None = None) -> Pieces:
        m = self.model
        tokens, scores, types = _pad(list(m.pieces), list(m.scores), list(m.types), size)
        return Pieces("llama", tokens, scores, types, [], None, m.add_space_prefix, m.collapse_spaces)

    def to_hf(self) -> "HfTokenizer":
        """The same vocabulary for `tokenizers`, as Llama's converter does it. Control pieces are matched in text there,
        and where two merges that give one piece overlap, `tokenizers` may choose the other one."""
        m = self.model
        unknown = next((p for p, t in zip(m.pieces, m.types) if t == UNKNOWN), None)
        tok = tokenizers.Tokenizer(
            models.BPE(
                vocab={p: i for i, p in enumerate(m.pieces)},
                merges=m.merges(),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=BYTE in m.types,
            )
        )
        steps: list[Any] = []
        if m.collapse_spaces:
            steps += [normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), "")]
            steps += [normalizers.Replace(tokenizers.Regex(" +"), " ")]
        if m.add_space_prefix:
            steps += [normalizers.Prepend(spm.SPACE)]
        tok.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", spm.SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if m.add_space_prefix else []
        tok.decoder = decoders.Sequence(
            [decoders.Replace(spm.SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        special = [AddedToken(p, special=True, normalized=False) for p, t in zip(m.pieces, m.types) if t in (2, 3)]
        tok.add_special_tokens(special)
        user = [p for p, t in zip(m.pieces, m.types) if t == USER_DEFINED]
        tok.add_tokens([AddedToken(p.replace(spm.SPACE, " "), normalized=False) for p in user])
        config = {"add_bos_token": self.adds_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"add_eos_token": False, "unk_token": unknown}
        if self.bos_id is not None:
            config["bos_token"] = m.pieces[self.bos_id]
            _prepend_bos(tok, m.pieces[self.bos_id], self.bos_id, self.adds_bos)
        if self.eos_ids:
            config["eos_token"] = m.pieces[self.eos_ids[0]]
        return HfTokenizer(tok, config, self.eos_ids)

    def save(self, folder: str | Path) -> None:
        self.to_hf().save(folder)


class HfTokenizer(Tokenizer):
    """A `tokenizers` tokenizer. BOS is added here, not by its post-processor."""

    def __init__(self, tok: tokenizers.Tokenizer, config: dict[str, Any], eos_ids: Sequence[int] = ()):
        tok.no_truncation()
        tok.no_padding()
        self.tok, self.config = tok, config
        self._json = json.loads(tok.to_str())
        self._added = {a["id"]: a for a in self._json["added_tokens"]}
        self.vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
        added = tok.encode("", add_special_tokens=True).ids  # what the post-processor puts around a text
        self.bos_id = self._special("bos_token", added[0] if added else None)
        eos = self._special("eos_token", next((i for i, a in self._added.items() if a["content"] in _EOS_NAMES), None))
        self.eos_ids = tuple(dict.fromkeys([*([eos] if eos is not None else []), *eos_ids]))
        explicit = config.get("add_bos_token")
        starts = bool(added) and added[0] == self.bos_id
        self.adds_bos = self.bos_id is not None and (explicit if isinstance(explicit, bool) else starts)

    def _special(self, key: str, default: int | None) -> int | None:
        name = self.config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if name is None:
            return None if key in self.config else default
        i = self.tok.token_to_id(name)
        if i is None:
            raise InputError(
                f"tokenizer_config.json: {key} {name!r} is no token of tokenizer.json (allowed: one of them)"
            )
        return i

    @property
    def _spm_like(self) -> bool:
        return bool(self._json["model"].get("byte_fallback"))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tok.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tok.decode([int(i) for i in ids], skip_special_tokens=True)

    def _state(self) -> Any:
        return self._json

    def save(self, folder: str | Path) -> None:
        names = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        tokens = {k: None if i is None else self.tok.id_to_token(i) for k, i in names.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config | tokens
        config["add_bos_token"] = self.adds_bos
        write_text(Path(folder) / "tokenizer.json", self.tok.to_str(pretty=True))
        write_text(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def piece_bytes(self, i: int) -> bytes:
        added = self._added.get(i)
        if added is not None:
            return b"" if added["special"] else added["content"].encode()
        piece = self.tok.id_to_token(i)
        if piece is None:
            return b""
        if not self._spm_like:
            return bytes(_BYTE_OF.get(c, 0) for c in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(spm.SPACE, " ").encode()

    def pieces(self, size: int | None = None) -> Pieces:
        model = self._json["model"]
        if model["type"] != "BPE":
            raise InputError(f"tokenizer of type {model['type']} (allowed for GGUF: BPE)")
        tokens, types = [], []
        for i in range(self.vocab_size):
            piece = self.tok.id_to_token(i)
            added = self._added.get(i)
            if piece is None:
                piece, kind = f"[PAD{i}]", UNUSED
            elif piece == model.get("unk_token"):
                kind = UNKNOWN
            elif added is not None:
                kind = CONTROL if added["special"] else USER_DEFINED
            elif self._spm_like and len(piece) == 6 and piece.startswith("<0x"):
                kind = BYTE
            else:
                kind = NORMAL
            tokens.append(piece)
            types.append(kind)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        if self._spm_like:
            rank: dict[str, int] = {}
            for r, merge in enumerate(merges):
                rank.setdefault(merge.replace(" ", ""), r)
            scores = [float(-rank.get(t, 0)) for t in tokens]
            tokens, scores, types = _pad(tokens, scores, types, size)
            return Pieces("llama", tokens, scores, types, [], None, self._space_prefix())
        # A GGUF array cannot be empty: a merge of two bytes that no UTF-8 text holds changes nothing.
        merges = merges or [f"{_CHAR_OF[0xFF]} {_CHAR_OF[0xFE]}"]
        tokens, scores, types = _pad(tokens, [0.0] * len(tokens), types, size)
        return Pieces("gpt2", tokens, scores, types, merges, self._pre(), False)

    def _steps(self, key: str, inner: str) -> list[dict[str, Any]]:
        node = self._json.get(key)
        return [] if node is None else node[inner] if node["type"] == "Sequence" else [node]

    def _space_prefix(self) -> bool:
        prepend = any(s["type"] == "Prepend" for s in self._steps("normalizer", "normalizers"))
        metaspace = [s for s in self._steps("pre_tokenizer", "pretokenizers") if s["type"] == "Metaspace"]
        return prepend or any(s.get("prepend_scheme", "always") != "never" for s in metaspace)

    def _pre(self) -> str | None:
        parts = []
        for step in self._steps("pre_tokenizer", "pretokenizers"):
            match step:
                case {"type": "Split", "pattern": {"Regex": regex}}:
                    parts.append(regex)
                case {"type": "Digits", "individual_digits": True}:
                    parts.append("digits")
                case {"type": "ByteLevel", "add_prefix_space": False}:
                    parts += [_GPT2_WORDS] if step.get("use_regex", True) else []
                case _:
                    return None
        return _PRE.get(tuple(parts))


class ByteTokenizer(HfTokenizer):
    """Ids 0 to 255 are the bytes, 256 is BOS, 257 EOS; 258 tokens."""

    def __init__(self):
        tok = tokenizers.Tokenizer(models.BPE(vocab={_CHAR_OF[b]: b for b in range(256)}, merges=[]))
        super().__init__(*_byte_level(tok, (BOS, EOS)))


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (BOS, EOS)) -> Tokenizer:
    """A byte-level BPE with GPT-2's word splits, the same for the same texts.

    `special` are control tokens with the first ids; the first is BOS, the last EOS (one token may be both). BOS starts
    every text. Raises `InputError` when the texts are too small to fill `vocab_size`.
    """
    special = tuple(special)
    if not special or vocab_size < 256 + len(special):
        need = 256 + len(special)
        raise InputError(
            f"vocab_size {vocab_size} with {len(special)} special tokens (allowed: 1 or more, at least {need})"
        )
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=[_CHAR_OF[b] for b in range(256)],
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    if tok.get_vocab_size() != vocab_size:
        raise InputError(f"texts give {tok.get_vocab_size()} tokens of vocab_size {vocab_size} (allowed: more text)")
    return HfTokenizer(*_byte_level(tok, special))


def _byte_level(tok: tokenizers.Tokenizer, special: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    _prepend_bos(tok, special[0], tok.token_to_id(special[0]), True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    return tok, config | {"bos_token": special[0], "eos_token": special[-1]}


def _prepend_bos(tok: tokenizers.Tokenizer, bos: str, bos_id: int, adds: bool) -> None:
    if adds:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


_CHAR_OF = _byte_alphabet()
_BYTE_OF = {c: b for b, c in enumerate(_CHAR_OF)}
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


def _pad(tokens: list[str], scores: list[float], types: list[int], size: int | None):
    size = len(tokens) if size is None else size
    if size < len(tokens):
        raise InputError(f"vocabulary of {size} for a tokenizer of {len(tokens)} tokens (allowed: at least as many)")
    extra = range(len(tokens), size)
    return [*tokens, *(f"[PAD{i}]" for i in extra)], [*scores, *[0.0] * len(extra)], [*types, *[UNUSED] * len(extra)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}") from e


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as e:
        raise InputError(f"{path} is no JSON: {e.msg} at line {e.lineno}") from e


def _eos_ids(folder: Path) -> list[int]:
    """EOS ids that the model's own configuration names."""
    for name in ("generation_config.json", "config.json"):
        ids = (_read_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    return []

"""SentencePiece BPE without the library: its model file, its normalisation and its merge order, exactly.

The encoder merges the adjacent pair whose joined piece has the highest score, the leftmost first, over the whole text,
and spells what is no piece as bytes `<0xXX>`. llama.cpp's `llama` vocabularies and llama2.c's `tokenizer.bin` are the
same table of (piece, score, type).
"""

import dataclasses
import heapq
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from lowbit.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the same numbers in sentencepiece and GGUF
SPACE = "▁"


def byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


@dataclasses.dataclass(frozen=True)
class SpmModel:
    """A table of pieces. `add_space_prefix` puts a space before the text; `collapse_spaces` is sentencepiece's
    `remove_extra_whitespaces`: it strips the ends and keeps one of several spaces."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    add_space_prefix: bool = True
    collapse_spaces: bool = False

    def __post_init__(self):
        if not len(self.pieces) == len(self.scores) == len(self.types):
            counts = f"{len(self.pieces)} pieces, {len(self.scores)} scores, {len(self.types)} types"
            raise InputError(f"tokenizer has {counts} (allowed: equal counts)")
        ids: dict[str, int] = {}
        for i, (piece, kind) in enumerate(zip(self.pieces, self.types)):
            if kind in (NORMAL, USER_DEFINED, UNUSED):
                ids.setdefault(piece, i)
        byte_ids = {p: i for i, (p, t) in enumerate(zip(self.pieces, self.types)) if t == BYTE}
        unknown = next((i for i, t in enumerate(self.types) if t == UNKNOWN), None)
        table = [byte_ids.get(byte_piece(b), unknown) for b in range(256)]
        if None in table:
            raise InputError(f"tokenizer has no byte piece {byte_piece(table.index(None))} and no unknown piece")
        user = sorted((p for p, t in zip(self.pieces, self.types) if t == USER_DEFINED), key=len, reverse=True)
        # If no piece has a space after something else, no merge crosses the start of a word: words encode alone.
        crossing = any(re.search(f"[^{SPACE}]{SPACE}", p) for p in ids)
        object.__setattr__(self, "_ids", ids)
        object.__setattr__(self, "_bytes", table)
        object.__setattr__(self, "_fallback", bool(byte_ids))
        object.__setattr__(self, "_unknown", unknown)
        object.__setattr__(self, "_user", re.compile("(" + "|".join(map(re.escape, user)) + ")") if user else None)
        object.__setattr__(self, "_words", None if crossing else re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+"))
        object.__setattr__(self, "_memo", {})

    def normalize(self, text: str) -> str:
        if self.collapse_spaces:
            text = re.sub(" +", " ", text.strip(" "))
        if text and self.add_space_prefix:
            text = " " + text
        text = text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self.collapse_spaces else text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS. Control pieces are never matched in text."""
        text = self.normalize(text)
        out: list[int] = []
        for i, part in enumerate(self._user.split(text) if self._user else [text]):
            if i % 2:
                out.append(self._ids[part])
                continue
            for word in self._words.findall(part) if self._words else [part]:
                ids = self._memo.get(word)
                if ids is None:
                    ids = self._merge(word)
                    if len(word) <= 32 and len(self._memo) < 200_000:
                        self._memo[word] = ids
                out.extend(ids)
        if not self._fallback:  # a run of unknown characters is one unknown piece
            out = [t for k, t in enumerate(out) if t != self._unknown or k == 0 or out[k - 1] != t]
        return out

    def _merge(self, word: str) -> list[int]:
        ids, scores = self._ids, self.scores
        symbols: list[str | None] = list(word)
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, str]] = []

        def propose(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                joined = symbols[left] + symbols[right]
                i = ids.get(joined)
                if i is not None:
                    heapq.heappush(heap, (-scores[i], left, joined))

        for k in range(len(symbols) - 1):
            propose(k, k + 1)
        while heap:
            _, left, joined = heapq.heappop(heap)
            if symbols[left] is None:
                continue
            right = after[left]
            if right >= len(symbols) or symbols[left] + symbols[right] != joined:
                continue  # one of the two has been merged since
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            propose(before[left], left)
            propose(left, after[left])
        out = []
        for s in symbols:
            if s is not None:
                i = ids.get(s)
                out.extend([i] if i is not None else [self._bytes[b] for b in s.encode("utf-8", "surrogatepass")])
        return out

    def piece_bytes(self, i: int) -> bytes:
        """What a piece stands for in the text; nothing for control pieces."""
        match self.types[i]:
            case 6:
                return bytes([int(self.pieces[i][3:5], 16)])
            case 1 | 4 | 5:
                return self.pieces[i].replace(SPACE, " ").encode()
        return b""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; the space that `add_space_prefix` put in front is taken off again."""
        text = b"".join(self.piece_bytes(int(i)) for i in ids).decode("utf-8", "replace")
        return text[1:] if self.add_space_prefix and text.startswith(" ") else text

    def merges(self) -> list[tuple[str, str]]:
        """The table as ranked merges, for `tokenizers`: by score of the result, then by the longer left half."""
        ids = {p: i for p, i in self._ids.items() if self.types[i] == NORMAL}
        found = []
        for piece, i in ids.items():
            for k in range(1, len(piece)):
                if piece[:k] in ids and piece[k:] in ids:
                    found.append((-self.scores[i], i, -k, (piece[:k], piece[k:])))
        return [pair for *_, pair in sorted(found)]


# -- llama2.c's tokenizer.bin -----------------------------------------------------------------------------------------


def read_llama2c(path: str | Path, collapse_spaces: bool | None = None) -> SpmModel:
    """The table of a llama2.c `tokenizer.bin`: int32 longest piece, then float32 score, int32 length, bytes per piece.

    Ids 0 to 2 are unknown, BOS and EOS, 3 to 258 the bytes. The file does not say whether the tokenizer collapses
    spaces; by default it is taken to if no piece has two spaces, which is so in a vocabulary trained with collapsing.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot read tokenizer {path}: {e.strerror or e}") from e
    pieces, scores, at = [], [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise InputError(f"tokenizer {path} is cut off at byte {len(data)} inside piece {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= 1024 or at + length > len(data):
            raise InputError(f"tokenizer {path}: piece {len(pieces)} has length {length} at byte {at} of {len(data)}")
        try:
            pieces.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError as e:
            raise InputError(
                f"tokenizer {path}: piece {len(pieces)} is no UTF-8 (allowed: a llama2.c tokenizer)"
            ) from e
        scores.append(score)
        at += length
    if len(pieces) < 259 or pieces[3] != byte_piece(0) or pieces[258] != byte_piece(255):
        raise InputError(
            f"tokenizer {path} has {len(pieces)} pieces without bytes at 3 to 258 (allowed: a llama2.c one)"
        )
    pieces[1], pieces[2] = pieces[1].strip(), pieces[2].strip()
    pieces = [p.replace(" ", SPACE) if i >= 259 else p for i, p in enumerate(pieces)]
    if collapse_spaces is None:
        collapse_spaces = not any(SPACE * 2 in p for p in pieces)
    types = (UNKNOWN, CONTROL, CONTROL) + (BYTE,) * 256 + (NORMAL,) * (len(pieces) - 259)
    return SpmModel(tuple(pieces), tuple(scores), types, True, collapse_spaces)


# -- sentencepiece's .model, a protobuf -------------------------------------------------------------------------------


def read_model(path: str | Path) -> tuple[SpmModel, int, tuple[int, ...]]:
    """A sentencepiece BPE `.model` file as `(table, bos id, eos ids)`.

    Only what decides the ids is read: pieces, scores, types and the two space switches. Raises `InputError` for other
    model types (unigram) and for a normalisation other than the identity.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot read tokenizer {path}: {e.strerror or e}") from e
    try:
        pieces, scores, types = [], [], []
        trainer: dict[int, object] = {}
        normalizer: dict[int, object] = {}
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                types.append(piece.get(3, NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as e:
        raise InputError(f"tokenizer {path} is corrupt (allowed: a sentencepiece model)") from e
    if not pieces:
        raise InputError(f"tokenizer {path} has no pieces (allowed: a sentencepiece model)")
    if trainer.get(3, 1) != 2:
        kinds = {1: "unigram", 3: "word", 4: "char"}
        raise InputError(f"tokenizer {path} is {kinds.get(trainer.get(3, 1), 'unknown')} (allowed: BPE)")
    if normalizer.get(2):
        name = normalizer.get(1, b"").decode(errors="replace")
        raise InputError(f"tokenizer {path} normalises text by {name!r} (allowed: identity)")
    model = SpmModel(tuple(pieces), tuple(scores), tuple(types), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))
    bos, eos = (_signed(trainer.get(k, default)) for k, default in ((41, 1), (42, 2)))
    return model, bos, (eos,) if eos >= 0 else ()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes):
    """`(field number, value)` of one protobuf message: int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
            case 1:
                value, at = data[at : at + 8], at + 8
            case 2:
                size, at = _varint(data, at)
                value, at = data[at : at + size], at + size
            case 5:
                value, at = data[at : at + 4], at + 4
            case _:
                raise ValueError("wire type")
        if at > len(data):
            raise ValueError("cut off")
        yield key >> 3, value

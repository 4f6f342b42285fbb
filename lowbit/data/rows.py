"""Training text as fixed rows: tokenised once into one flat file, then addressed by global index.

Row r is `stream[r T : r T + T + 1]`, so every token but the first is a target exactly once. Which row stands in slot b
of step s is a pure function of (seed, s B + b): the only state of the data is the step number, and resume is exact on
any number of processes. No iterator has a state to save, so no data-loading library (grain) is needed: the file is
mapped, a batch is B slices.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.data.corpus import Tokenized
from lowbit.data.tokenizer import Tokenizer
from lowbit.errors import InputError
from lowbit.files import atomic_path, write_text

VERSION = 1
_CHUNK = 256  # documents tokenised at once


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of rows holds. Two folders with equal manifests have equal rows."""

    version: int
    seq_len: int
    dtype: str  # of the tokens: uint16 or uint32, little-endian
    tokenizer: str  # Tokenizer.hash
    text: str  # SHA-256 over the documents
    documents: int
    tokens: int
    rows: int
    bytes: int  # UTF-8 bytes of the documents


def prepare(documents: Iterable[str], tokenizer: Tokenizer, seq_len: int, folder: str | Path) -> "Rows":
    """Tokenises `documents` into `folder`, or opens it if it already holds exactly these rows.

    Every document starts with BOS if the tokenizer adds it and ends with EOS if there is one; a `Tokenized` one is its
    ids. Memory is bounded by a few hundred documents. Run it on one process; the others open the folder.

    Raises:
      InputError: the folder holds other rows (it is left alone), there is no text, less than one row of it, or ids of
        another tokenizer.
    """
    folder = Path(folder)
    if seq_len < 1:
        raise InputError(f"seq_len {seq_len} (allowed: at least 1)")
    text = _Text(documents)
    if (folder / "manifest.json").exists():
        rows = Rows(folder)
        for _ in text:
            pass
        asked = {"seq_len": seq_len, "tokenizer": tokenizer.hash, "text": text.hash.hexdigest()}
        for key, value in asked.items():
            have = getattr(rows.manifest, key)
            if have != value:
                raise InputError(f"{folder} holds rows with {key} {have} (allowed: {value}, or another folder)")
        return rows
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    starts, count = [], 0
    with atomic_path(folder / "tokens.bin") as tmp, open(tmp, "wb") as f:
        source = iter(text)
        while chunk := list(islice(source, _CHUNK)):
            for ids in encoded(chunk, tokenizer):
                starts.append(count)
                count += len(ids)
                f.write(np.array(ids, dtype).tobytes())
        if not starts:
            raise InputError("text is empty (allowed: at least one non-empty document)")
        rows = (count - 1) // seq_len
        if rows < 1:
            raise InputError(f"text has {count} tokens (needed: at least {seq_len + 1}, one row of seq_len {seq_len})")
    with atomic_path(folder / "documents.bin") as tmp:
        np.array(starts, "<u8").tofile(tmp)
    manifest = Manifest(
        VERSION,
        seq_len,
        dtype.name,
        tokenizer.hash,
        text.hash.hexdigest(),
        len(starts),
        count,
        rows,
        text.bytes,
    )
    write_text(folder / "manifest.json", json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    return Rows(folder)


def encoded(documents: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each document as rows hold them. Raises `InputError` for ids of another tokenizer."""
    eos = list(tokenizer.eos_ids[:1])
    texts = iter(tokenizer.encode_many([d for d in documents if not isinstance(d, Tokenized)]))
    return [_given(d, tokenizer) if isinstance(d, Tokenized) else next(texts) + eos for d in documents]


def _given(document: Tokenized, tokenizer: Tokenizer) -> list[int]:
    if document.tokenizer != tokenizer.hash:
        raise InputError(
            f"text has token ids of tokenizer {document.tokenizer[:12]}, the model's is {tokenizer.hash[:12]} "
            "(allowed: the same one, or lines without the field tokens)"
        )
    if max(document.ids) >= tokenizer.vocab_size:
        raise InputError(
            f"text has token id {max(document.ids)} (allowed: 0 to {tokenizer.vocab_size - 1}, the tokenizer's)"
        )
    return list(document.ids)


class _Text:
    """The non-empty documents, with a running hash and byte count."""

    def __init__(self, documents: Iterable[str]):
        self.documents, self.hash, self.bytes = documents, hashlib.sha256(), 0

    def __iter__(self) -> Iterator[str]:
        for doc in self.documents:
            given = isinstance(doc, Tokenized)
            if given or doc.strip():
                data = doc.encode()
                self.hash.update(len(data).to_bytes(8, "little") + data)
                if given:
                    self.hash.update(b"tokens" + np.array(doc.ids, "<u4").tobytes())
                self.bytes += len(data)
                yield doc


class Rows:
    """Rows in a folder that `prepare` wrote; tokens stay on disk."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None):
        """Raises `InputError` for a folder without rows, a damaged one, or rows of another tokenizer."""
        folder = Path(folder)
        try:
            self.manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
        except OSError as e:
            raise InputError(f"{folder} has no rows: {e.strerror} (allowed: a folder that prepare wrote)") from e
        except (json.JSONDecodeError, TypeError) as e:
            raise InputError(f"{folder / 'manifest.json'} is damaged: {e} (allowed: one that prepare wrote)") from e
        m = self.manifest
        if m.version != VERSION:
            raise InputError(f"{folder} has rows of version {m.version} (allowed: {VERSION}; prepare the text again)")
        if tokenizer is not None and tokenizer.hash != m.tokenizer:
            raise InputError(f"{folder} has rows of tokenizer {m.tokenizer[:12]} (allowed: {tokenizer.hash[:12]})")
        dtype = np.dtype(m.dtype).newbyteorder("<")
        for name, need in (("tokens.bin", m.tokens * dtype.itemsize), ("documents.bin", m.documents * 8)):
            have = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if have != need:
                raise InputError(f"{folder / name} has {have} bytes (allowed: {need}, as its manifest says)")
        self._tokens = np.memmap(folder / "tokens.bin", dtype, "r")
        self._starts = np.fromfile(folder / "documents.bin", "<u8").astype(np.int64)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens, segments)` of row `i`, both int32 `[seq_len + 1]`; segments count a row's documents from 0."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        first = i * self.manifest.seq_len
        positions = np.arange(first, first + self.manifest.seq_len + 1)
        document = np.searchsorted(self._starts, positions, side="right").astype(np.int32)
        return np.asarray(self._tokens[first : first + len(positions)], np.int32), document - document[0]

    def take(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The rows of `indices`, stacked: `tokens` and `segments`, int32 `[N, seq_len + 1]`."""
        pairs = [self[int(i)] for i in indices]
        return {"tokens": np.stack([t for t, _ in pairs]), "segments": np.stack([s for _, s in pairs])}

    def indices(self, step: int, batch_size: int, seed: int = 0) -> np.ndarray:
        """Row of each slot of a step, int64 `[batch_size]`; each epoch is a fresh permutation of all rows."""
        index = step * batch_size + np.arange(batch_size, dtype=np.int64)
        epoch, position = np.divmod(index, len(self))
        out = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            out[here] = permute(position[here], len(self), seed, int(e))
        return out

    def batch(
        self, step: int, batch_size: int, seed: int = 0, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Any]:
        """`take` of the step's rows; a process gets its slice of the slots, the same rows however many there are.

        Raises `InputError` when `batch_size` does not divide by `process_count`.
        """
        if batch_size < 1 or batch_size % process_count:
            raise InputError(f"batch_size {batch_size} on {process_count} processes (allowed: a multiple of that)")
        share = batch_size // process_count
        return self.take(self.indices(step, batch_size, seed)[process_index * share :][:share])


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """`p(index)` for a permutation p of `range(n)` that depends on (seed, epoch) only.

    An eight-round Feistel network on the smallest even number of bits that holds n, walked until it lands inside: no
    table, no library generator whose stream could change between versions.
    """
    half = max(1, ((max(n - 1, 1)).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.sha512(f"{seed}/{epoch}".encode()).digest()
    keys = [np.uint64(int.from_bytes(digest[8 * r : 8 * r + 8], "little")) for r in range(8)]
    out = np.array(index, np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        x = out[todo]
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= n
    return out.astype(np.int64)

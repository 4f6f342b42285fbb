"""Which texts are the same: content hashes, sampled 13-grams, the train/held-out split and the check that it holds."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lowbit.errors import InputError
from lowbit.files import atomic_path

NGRAM = 13
KEEP_EVERY = 16
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: word order matters, every bit reaches the hash


def document_hash(text: str) -> str:
    """SHA-256 (hex) of the text in lower case with every run of white space as one space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def ngram_hashes(text: str, n: int = NGRAM, keep_every: int = KEEP_EVERY) -> np.ndarray:
    """Sorted unique uint64 hashes of the word `n`-grams whose hash is divisible by `keep_every`.

    Words are runs of letters, digits and underscores, in lower case. Sampling by hash value keeps the *same* n-grams in
    every text, so a shared passage of w words is found with probability `1 - (1 - 1/keep_every) ** (w - n + 1)`.
    """
    if n < 1 or keep_every < 1:
        raise InputError(f"n = {n}, keep_every = {keep_every} (allowed: both at least 1)")
    words = _WORD.findall(text.lower())
    if len(words) < n:
        return np.zeros(0, np.uint64)
    cache = {w: int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little") for w in set(words)}
    word_hash = np.array([cache[w] for w in words], np.uint64)
    count = len(words) - n + 1
    out = np.zeros(count, np.uint64)
    for i in range(n):  # Horner, modulo 2 ** 64
        out = out * _MULTIPLIER + word_hash[i : i + count]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the splitmix64 finaliser
        out = (out ^ (out >> np.uint64(shift))) * np.uint64(factor)
    out ^= out >> np.uint64(31)
    return np.unique(out[out % np.uint64(keep_every) == 0])


def deduplicate(documents: Iterable[str], threshold: float = 0.5, keep_every: int = KEEP_EVERY) -> list[str]:
    """Drops exact copies (by `document_hash`) and documents of whose sampled 13-grams more than `threshold` are old."""
    seen: set[str] = set()
    grams: set[int] = set()
    kept = []
    for doc in documents:
        key = document_hash(doc)
        if key in seen:
            continue
        mine = set(ngram_hashes(doc, keep_every=keep_every).tolist())
        if mine and len(mine & grams) > threshold * len(mine):
            continue
        seen.add(key)
        grams |= mine
        kept.append(doc)
    return kept


@dataclasses.dataclass(frozen=True)
class Split:
    """`held_out` shares no content hash and no sampled 13-gram with `train`; `dropped` is what stood in the way."""

    train: list[str]
    held_out: list[str]
    dropped: list[str]


def split(
    documents: Iterable[str],
    held_out: float = 0.05,
    threshold: float = 0.5,
    keep_every: int = KEEP_EVERY,
    salt: str = "",
) -> Split:
    """Splits by content hash: the same document is on the same side in every run, whatever lies around it.

    About `held_out` of the deduplicated documents are candidates to be held out; those that share any sampled 13-gram
    with training text (licence headers, copied code) are dropped. What one split held out is split again by another
    `salt`. Raises `InputError` if a side stays empty.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out = {held_out} (allowed: between 0 and 1)")
    kept = deduplicate(documents, threshold, keep_every)
    draws = [document_hash(salt + document_hash(d) if salt else d)[:16] for d in kept]
    chosen = [int(draw, 16) < held_out * 2**64 for draw in draws]
    train = [d for d, c in zip(kept, chosen) if not c]
    candidates = [d for d, c in zip(kept, chosen) if c]
    overlapping = set(Contamination.of(train, keep_every).overlap(candidates))
    out = Split(
        train,
        [d for i, d in enumerate(candidates) if i not in overlapping],
        [d for i, d in enumerate(candidates) if i in overlapping],
    )
    if not out.train or not out.held_out:
        raise InputError(
            f"split of {len(kept)} documents has {len(out.train)} to train on and {len(out.held_out)} held out"
            " (allowed: at least 1 each; use more documents or another fraction)"
        )
    return out


@dataclasses.dataclass(frozen=True)
class Contamination:
    """Fingerprint of a training text: its document hashes and sampled 13-grams, small enough to keep with a model."""

    documents: np.ndarray  # uint8 [N, 32], sorted
    ngrams: np.ndarray  # uint64 [M], sorted
    keep_every: int

    @classmethod
    def of(cls, documents: Sequence[str], keep_every: int = KEEP_EVERY) -> "Contamination":
        """The fingerprint of `documents`; 8 bytes per kept 13-gram, 32 per document."""
        hashes = sorted({document_hash(d) for d in documents})
        grams = [ngram_hashes(d, keep_every=keep_every) for d in documents]
        return cls(
            np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32),
            np.unique(np.concatenate([*grams, np.zeros(0, np.uint64)])),
            keep_every,
        )

    def save(self, path: str | Path) -> None:
        """Writes an uncompressed `.npz` (hashes do not compress), the same bytes every time."""
        with atomic_path(path) as tmp, open(tmp, "wb") as f:
            np.savez(f, documents=self.documents, ngrams=self.ngrams, keep_every=np.int64(self.keep_every))

    @classmethod
    def load(cls, path: str | Path) -> "Contamination":
        try:
            with np.load(path, allow_pickle=False) as f:
                return cls(f["documents"], f["ngrams"], int(f["keep_every"]))
        except (OSError, KeyError, ValueError, EOFError) as e:
            raise InputError(
                f"cannot read training hashes {path}: {e} (allowed: a file that Contamination.save wrote)"
            ) from e

    def overlap(self, documents: Sequence[str]) -> list[int]:
        """Indices of the documents that were trained on: equal content, or any sampled 13-gram in common."""
        known = {row.tobytes() for row in self.documents}
        out = []
        for i, doc in enumerate(documents):
            mine = ngram_hashes(doc, keep_every=self.keep_every)
            at = np.searchsorted(self.ngrams, mine)
            hit = self.ngrams[np.minimum(at, len(self.ngrams) - 1)] == mine if len(self.ngrams) else mine[:0] == 0
            if bytes.fromhex(document_hash(doc)) in known or hit.any():
                out.append(i)
        return out

    def assert_disjoint(self, documents: Sequence[str], what: str = "evaluation text") -> None:
        """Raises `InputError` naming the first document that `overlap` finds."""
        found = self.overlap(documents)
        if found:
            start = " ".join(documents[found[0]].split())[:60]
            raise InputError(
                f"{what}: {len(found)} of {len(documents)} documents overlap the training text, first {found[0]}"
                f" ({start!r}) (allowed: none)"
            )

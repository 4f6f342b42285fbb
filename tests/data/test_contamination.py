"""Same text is found, different text is not, and a split has nothing in common."""

import numpy as np
import pytest

from lowbit.data import contamination as c
from lowbit.errors import InputError


def words(seed: int, count: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 5000, count))


def test_document_hash_ignores_case_and_space_only():
    assert c.document_hash("Ab  c\n") == c.document_hash(" ab c")
    assert c.document_hash("ab c") != c.document_hash("abc")


def test_ngrams_depend_on_words_and_their_order():
    text = words(0, 40)
    all_of = c.ngram_hashes(text, keep_every=1)
    assert len(all_of) == 40 - 13 + 1
    swapped = text.split()
    swapped[20], swapped[21] = swapped[21], swapped[20]
    # 14 windows hold at least one of the two swapped words; only the rest is shared
    assert len(np.intersect1d(all_of, c.ngram_hashes(" ".join(swapped), keep_every=1))) == 28 - 14
    assert np.array_equal(all_of, c.ngram_hashes(text.upper().replace(" ", ", "), keep_every=1))
    assert len(c.ngram_hashes(words(0, 12), keep_every=1)) == 0


def test_sampling_keeps_the_same_ngrams_everywhere():
    text = words(1, 4000)
    full, kept = c.ngram_hashes(text, keep_every=1), c.ngram_hashes(text, keep_every=16)
    assert np.array_equal(kept, full[full % np.uint64(16) == 0])
    assert 150 < len(kept) < 360  # 3988 / 16 = 249
    inside = " ".join(text.split()[1000:1400])
    assert set(c.ngram_hashes(inside).tolist()) <= set(kept.tolist())


def test_duplicates_and_near_duplicates_go():
    text = words(2, 1000)
    near = text.replace(text.split()[500], "changed")
    other = words(3, 1000)
    assert c.deduplicate([text, other, text.upper(), near]) == [text, other]


def test_split_is_disjoint_and_stable():
    docs = [words(i, 300) for i in range(200)]
    leak = docs[5][: len(docs[5]) // 2]
    docs += [leak + " " + words(1000 + i, 300) for i in range(20)]  # shares a passage, is no near-duplicate
    s = c.split(docs, held_out=0.3)
    assert set(s.train) | set(s.held_out) | set(s.dropped) == set(docs)
    assert 30 < len(s.held_out) < 90 and s.dropped
    c.Contamination.of(s.train).assert_disjoint(s.held_out)
    again = c.split(docs[::-1], held_out=0.3)
    assert set(again.train) == set(s.train)
    with pytest.raises(InputError, match="1 held out|0 held out"):
        c.split(docs[:1], held_out=0.3)


def test_fingerprint_survives_a_file_and_finds_overlap(tmp_path):
    docs = [words(i, 300) for i in range(30)]
    c.Contamination.of(docs).save(tmp_path / "train.npz")
    c.Contamination.of(docs).save(tmp_path / "again.npz")
    assert (tmp_path / "train.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    known = c.Contamination.load(tmp_path / "train.npz")
    quoted = "new words before " + docs[3][:1000]
    short = "too short for any n-gram"
    assert known.overlap([words(99, 300), quoted, docs[7].upper(), short]) == [1, 2]
    assert c.Contamination.of([*docs, short]).overlap([short]) == [0]
    with pytest.raises(InputError, match="1 of 2 documents overlap"):
        known.assert_disjoint([short, docs[0]])
    known.assert_disjoint([short])


def test_damaged_fingerprint(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="cannot read training hashes"):
        c.Contamination.load(tmp_path / "x.npz")
    with pytest.raises(InputError, match="cannot read training hashes"):
        c.Contamination.load(tmp_path / "missing.npz")


def test_empty_fingerprint_overlaps_nothing():
    assert c.Contamination.of([]).overlap([words(0, 100)]) == []

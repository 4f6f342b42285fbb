"""Text that a model writes: its greedy beginnings, what it does not depend on, its way to training."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.cli import main
from lowbit.data import corpus
from lowbit.data.rows import prepare
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.models import synthesize as s
from lowbit.models.config import ModelConfig
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from tests.models.tiny import params_of

CONFIG = ModelConfig("llama", 264, 16, 24, 1, 2, 1, 8, 32, tied=True)  # six ids more than the tokenizer has
SETTINGS = s.Settings(rows=11, length=14, seed=3, batch_size=4)


def make(seed: int = 0, **changes) -> Model:
    return Model(dataclasses.replace(CONFIG, **changes), params_of(CONFIG, seed), ByteTokenizer(), "tiny")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "g.jsonl"
    return out, s.write(make(), SETTINGS, out)


def test_the_first_tokens_are_greedy_and_the_others_are_drawn(written):
    out, done = written
    model, rows = make(), rows_of(out)
    first, greedy = s.starts(model, SETTINGS)
    assert len(rows) == done.rows == len(set(first.tolist())) == 11 and set(greedy) == {3, 4, 5}
    assert [row["tokens"][0] for row in rows] == first.tolist()
    assert done.tokens == sum(len(row["tokens"]) for row in rows) and done.resumed == 0
    padded = np.zeros((11, 14), np.int32)
    for line, row in zip(padded, rows):
        line[: len(row["tokens"])] = row["tokens"]
    logits = np.array(model.logits(padded))
    logits[..., model.tokenizer.vocab_size :] = -np.inf
    best = logits.argmax(-1)
    later = []
    for row, line, count in zip(rows, best, greedy):
        ids = row["tokens"]
        assert ids[1 : count + 1] == line[: min(count, len(ids) - 1)].tolist()
        later += [a == b for a, b in zip(ids[count + 1 :], line[count:])]
        assert max(ids) < model.tokenizer.vocab_size and row["text"] == model.tokenizer.decode(ids)
        assert (ids[-1] in model.tokenizer.eos_ids or len(ids) == 14) and not set(ids[1:-1]) & set(
            model.tokenizer.eos_ids
        )
    assert 0 < np.mean(later) < 0.9  # sampled, not greedy


def test_rows_do_not_depend_on_the_batch(written, tmp_path):
    s.write(make(), dataclasses.replace(SETTINGS, batch_size=3), tmp_path / "g.jsonl")
    assert (tmp_path / "g.jsonl").read_bytes() == written[0].read_bytes()
    s.write(make(), dataclasses.replace(SETTINGS, seed=4, batch_size=3), tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() != written[0].read_bytes()


def test_interrupted_anywhere_it_ends_with_the_same_bytes(written, tmp_path):
    out, state = tmp_path / "g.jsonl", tmp_path / ".g.jsonl.partial"

    def killed(done, total, rate):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            s.write(make(), SETTINGS, out, killed)
    assert not out.exists() and state.read_bytes().count(b"\n") == 1 + 8
    with open(state, "ab") as f:
        f.write(b'{"text": "whole, but not of a whole batch"}\n{"text": "to')
    with pytest.raises(InputError, match="begun otherwise: length was 14 and is 13, seed was 3 and is 9"):
        s.write(make(), dataclasses.replace(SETTINGS, seed=9, length=13), out)
    with pytest.raises(InputError, match="begun otherwise: model was"):
        s.write(make(1), SETTINGS, out)
    done = s.write(make(), SETTINGS, out)
    assert done.resumed == 8 and out.read_bytes() == written[0].read_bytes() and not state.exists()
    assert (done.rows, done.tokens, done.ended) == (written[1].rows, written[1].tokens, written[1].ended)


def test_eos_ends_a_row_and_is_kept(tmp_path, written):
    eos = rows_of(written[0])[0]["tokens"][6]
    s.write(make(eos_token_ids=(eos,)), SETTINGS, tmp_path / "g.jsonl")
    for free, row in zip(rows_of(written[0]), rows_of(tmp_path / "g.jsonl")):
        ids = free["tokens"]
        assert row["tokens"] == (ids[: ids.index(eos, 1) + 1] if eos in ids[1:] else ids)


def test_training_sees_the_very_ids(written, tmp_path):
    """Encoding the text again would give others: ids that are no valid UTF-8 become U+FFFD."""
    documents = list(corpus.documents(written[0]))
    tokenizer, ids = ByteTokenizer(), [row["tokens"] for row in rows_of(written[0])]
    assert any(tokenizer.encode(d, bos=False) != i for d, i in zip(documents, ids))
    rows = prepare(documents, tokenizer, 9, tmp_path / "rows")
    stream = np.concatenate([rows[i][0][: 9 + (i == len(rows) - 1)] for i in range(len(rows))])
    np.testing.assert_array_equal(stream, np.concatenate(ids)[: len(stream)])
    documents_of = np.repeat(np.arange(11), [len(i) for i in ids])
    for i in range(len(rows)):
        np.testing.assert_array_equal(np.diff(rows[i][1]), np.diff(documents_of[9 * i : 9 * i + 10]))
    assert len(prepare(corpus.documents(written[0]), tokenizer, 9, tmp_path / "rows")) == len(rows)
    with pytest.raises(InputError, match="holds rows with text"):
        prepare([str(d) for d in documents], tokenizer, 9, tmp_path / "rows")


def test_ids_of_another_tokenizer_and_lines_that_lie_are_refused(written, tmp_path):
    line = rows_of(written[0])[0]
    for changes, message in (
        ({"tokenizer": "f" * 64}, "token ids of tokenizer ffffffffffff, the model's is"),
        ({"tokens": [1, 999]}, "token id 999 .allowed: 0 to 257"),
        ({"tokens": [1, -1]}, "line 1: tokens .allowed: a list"),
        ({"tokens": "abc"}, "line 1: tokens .allowed: a list"),
    ):
        (tmp_path / "x.jsonl").write_text(json.dumps(line | changes))
        with pytest.raises(InputError, match=message):
            prepare(corpus.documents(tmp_path / "x.jsonl"), ByteTokenizer(), 4, tmp_path / "rows")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a data set's own field", "tokens": 5}))
    assert list(corpus.documents(tmp_path / "x.jsonl")) == ["a data set's own field"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": 33}, "length is 33 .*context, 32"),
        ({"rows": 259}, "rows is 259 .*258 tokens"),
        ({"rows": 0}, "rows is 0"),
        ({"length": 1, "greedy": (0, 0)}, "length is 1"),
        ({"greedy": (5, 3)}, r"greedy is \(5, 3\)"),
        ({"greedy": (3, 14)}, r"greedy is \(3, 14\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        s.write(make(), dataclasses.replace(SETTINGS, **changes), tmp_path / "g.jsonl")
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Model(dataclasses.replace(CONFIG, vocab_size=258), {}, ByteTokenizer())
    save_hf(model.replace(params=params_of(model.config, dtype=jnp.bfloat16)), tmp_path / "m")
    argv = "synthesize m --out g.jsonl --rows 6 --length 12 --top-k 0 --greedy 2 4 --batch-size 6".split()
    assert main([*argv, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["rows"] == 6 == len(rows_of(tmp_path / "g.jsonl")) and out["tokens_per_second"] > 0
    assert main(argv) == 2 and "g.jsonl exists" in capsys.readouterr().err
    assert main([*argv, "--force", "--rows", "300"]) == 2 and "rows is 300" in capsys.readouterr().err
    assert main([*argv[:3], "g.txt"]) == 2 and "ends in .jsonl" in capsys.readouterr().err

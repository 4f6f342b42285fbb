"""What is kept of a teacher: the same loss as of the live one, rows by global index, refusal of what is another's."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG

from lowbit.cli import main
from lowbit.data.rows import prepare
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.experiment.run import read_metrics
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.train import objective
from lowbit.train.config import TrainConfig
from lowbit.train.teacher_cache import Layout, TeacherCache, check, describe
from tests.models.tiny import params_of

BYTES = dataclasses.replace(CONFIG, vocab_size=258, num_layers=1)
HASH = ByteTokenizer().hash
SETTINGS = TrainConfig(batch_size=3, loss="kl", temperature=2.0)


def byte_model(seed: int = 0) -> Model:
    return Model(BYTES, params_of(BYTES, seed), ByteTokenizer())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    text = ["the quick brown fox", "jumps over the lazy dog, which sleeps", "and sleeps, and sleeps"]
    return prepare(text, ByteTokenizer(), 12, tmp_path_factory.mktemp("rows") / "r")


def test_a_whole_vocabulary_gives_the_live_loss_and_gradient(rows, tmp_path):
    teacher, student = byte_model(0), byte_model(1)
    indices = np.array([4, 0, 2])
    batch = rows.take(indices)
    totals, grads = {}, {}
    for k, values in ((None, ""), (258, "float32"), (5, "float16")):
        more = {}
        if k is not None:
            cache = TeacherCache(tmp_path / str(k), describe(teacher, HASH, k, SETTINGS, values), rows)
            assert cache.fill(indices, teacher, 2) == 3
            more = cache.take(indices)
            assert more["teacher_ids"].shape == (3, 12, k) and more["teacher_logp"].shape == (3, 12, k + (k < 258))
        f = objective.language(BYTES, SETTINGS, BYTES, cached=k is not None)
        given = {n: jnp.asarray(a) for n, a in (batch | more).items()}
        frozen = teacher.params if k is None else None
        (totals[k], _), grads[k] = jax.jit(jax.value_and_grad(f, has_aux=True))(student.params, frozen, given)
    assert float(totals[258]) == pytest.approx(float(totals[None]), rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(grads[k]) for k in (None, 258)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()))
    assert 0.05 * totals[None] < totals[5] < totals[None]


def test_the_bytes_that_are_announced_are_those_on_the_disk(rows, tmp_path):
    for k, values in ((7, "float16"), (258, "float32")):
        teacher = byte_model()
        cache = TeacherCache(tmp_path / values, describe(teacher, HASH, k, SETTINGS, values), rows)
        stored = sum((tmp_path / values / f"{n}.npy").stat().st_size - 128 for n in ("teacher_ids", "teacher_logp"))
        assert stored == len(rows) * 12 * cache.manifest.layout.bytes_per_token
    assert Layout(258, 7).bytes_per_token == 7 * 2 + 8 * 2 and Layout(10**5, 4, "float32").bytes_per_token == 16 + 20


def test_rows_come_in_any_order_and_interruption_loses_what_was_not_whole(rows, tmp_path):
    teacher = byte_model()
    manifest = describe(teacher, HASH, 6, SETTINGS)
    everything = np.arange(len(rows))
    whole = TeacherCache(tmp_path / "whole", manifest, rows)
    whole.fill(everything, teacher, 3)
    part = TeacherCache(tmp_path / "part", manifest, rows)

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.fill(everything[::-1], teacher, 3, killed)
    again = TeacherCache(tmp_path / "part", manifest, rows)
    assert again.missing(everything).tolist() == list(range(3, len(rows)))
    with pytest.raises(InputError, match="has no row 3"):
        again.take(np.array([0, 3]))
    assert again.fill(everything, teacher, 3) == len(rows) - 3 and again.fill(everything, teacher, 3) == 0
    for name in ("teacher_ids.npy", "teacher_logp.npy", "done.npy", "manifest.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
    order = np.array([2, 0, 2])
    np.testing.assert_array_equal(whole.take(order)["teacher_ids"], whole.take(everything)["teacher_ids"][order])


def test_a_cache_of_something_else_is_refused_with_the_reason(rows, tmp_path):
    teacher = byte_model()
    manifest = describe(teacher, HASH, 6, SETTINGS)
    TeacherCache(tmp_path / "c", manifest, rows)
    other = prepare(["another text that is long enough for a row"], ByteTokenizer(), 12, tmp_path / "rows")
    for asked, why in (
        (describe(byte_model(1), HASH, 6, SETTINGS), "another teacher: [0-9a-f]{12}... .allowed: [0-9a-f]{12}..."),
        (dataclasses.replace(manifest, tokenizer="f" * 64), "another tokenizer"),
        (describe(teacher, HASH, 5, SETTINGS), "another k: 6 .allowed: 5,"),
        (describe(teacher, HASH, 6, SETTINGS, "float32"), "another values: 'float16'"),
        (describe(teacher, HASH, 6, dataclasses.replace(SETTINGS, temperature=1.0)), "another temperature: 2.0"),
        (describe(teacher, HASH, 6, dataclasses.replace(SETTINGS, dtype="bfloat16")), "another compute: 'float32'"),
    ):
        with pytest.raises(InputError, match=why):
            check(tmp_path / "c", asked)
    with pytest.raises(InputError, match="another text: text: [0-9a-f]{12}..."):
        TeacherCache(tmp_path / "c", manifest, other)
    for k in (0, 259):
        with pytest.raises(InputError, match=f"teacher_top_k is {k} .allowed: 1 to the teacher's vocabulary, 258"):
            describe(teacher, HASH, k, SETTINGS)
    with open(tmp_path / "c/teacher_ids.npy", "r+b") as f:
        f.truncate(200)
    with pytest.raises(InputError, match="teacher_ids.npy is damaged"):
        TeacherCache(tmp_path / "c", manifest, rows)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds thesis.tex"):
        TeacherCache(tmp_path / "d", manifest, rows)


ARGV = "train m --text text.txt --format int4:g8 --batch-size 2 --seq 16 --steps 2 --log-every 1".split()
CACHE = "--teacher-cache tc --teacher-top-k 258 --teacher-dtype float32".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hf(byte_model(), tmp_path / "m", dtype="float32")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)


def losses(name: str, *options: str) -> list[float]:
    assert main([*ARGV, "--out", name, *options]) == 0
    return [m["loss"] for m in read_metrics(f"{name}/metrics.jsonl")]


def test_training_fills_a_cache_or_refuses_it(here, capsys):
    assert len(losses("first", *CACHE)) == 2
    told = "teacher cache tc: 4 of 4 rows to add, 99,072 bytes, 1548 a token of 258 known ones"
    assert told in capsys.readouterr().err
    for options, why in (
        (["--teacher-top-k", "5"], "without --teacher-cache"),
        ([*CACHE, "--loss", "ce"], "--teacher-cache with --loss ce"),
        (["--teacher-cache", "tc", "--teacher-top-k", "300"], "teacher_top_k is 300"),
        (["--teacher-cache", "tc"], "tc is of another k: 258 .allowed: 64"),
        ([*CACHE, "--hidden-weight", "1"], "hidden_weight is 1.0 with cached"),
    ):
        capsys.readouterr()
        assert main([*ARGV, "--out", "refused", *options]) == 2
        assert re.search(why, capsys.readouterr().err)


@pytest.mark.slow
def test_another_recipe_reads_what_an_earlier_run_wrote(here, capsys):
    live, first = losses("live"), losses("first", *CACHE)
    assert first == pytest.approx(live, rel=1e-5)
    capsys.readouterr()
    learned = losses("learned", *CACHE, "--recipe", "ste-learned")
    assert learned[0] == pytest.approx(first[0], rel=1e-6)
    assert "teacher cache tc: 0 of 4 rows to add" in capsys.readouterr().err
    losses("other", *CACHE, "--seed", "1")  # asks for other rows, which are added
    assert re.search("teacher cache tc: [1-4] of 4 rows to add", capsys.readouterr().err)
    assert main([*ARGV, "--out", "x", *CACHE, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_bytes_per_token"] == 1548

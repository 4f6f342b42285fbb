"""Run directories: what is written, what is refused, and resuming without duplicate lines."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lowbit.errors import InputError
from lowbit.experiment import run as runs
from lowbit.experiment.run import Run

CONFIG = {"steps": 4, "opt": {"lr": 0.1}}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_files_of_a_run(tmp_path):
    with Run.open(tmp_path / "r", CONFIG, experiment="x", argv=["run", "x.py", "--a b"]) as run:
        run.log(1, loss=jnp.float32(2.5), note="hi")
        assert json.loads((tmp_path / "r/metrics.jsonl").read_text())["loss"] == 2.5  # flushed, not only on close
        run.log(2, loss=float("nan"))
        run.summary(loss=1.0)
        assert run.summary(kl=2, rows=[{"a": 1}]) == {"loss": 1.0, "kl": 2, "rows": [{"a": 1}]}
    read = lambda name: json.loads((tmp_path / "r" / name).read_text())  # noqa: E731
    assert read("config.json") == CONFIG
    assert read("summary.json") == {"loss": 1.0, "kl": 2, "rows": [{"a": 1}]}
    info = read("run.json")
    assert info["experiment"] == "x"
    assert info["starts"][0]["command"] == "lowbit run x.py '--a b'"
    assert read("environment.json")["versions"]["jax"] == jax.__version__
    assert [m["loss"] for m in run.metrics()] == [2.5, "nan"]
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "config.json", "run.json", "environment.json", "metrics.jsonl", "summary.json",
    }  # fmt: skip


def test_git_revision_and_dirty_flag(tmp_path):
    assert runs.git_state(tmp_path) is None
    git = lambda *a: subprocess.run(  # noqa: E731
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True, capture_output=True
    )
    git("init")
    git("commit", "--allow-empty", "-m", "x")
    state = runs.git_state(tmp_path)
    assert len(state["revision"]) == 40 and state["dirty"] is False
    (tmp_path / "new").write_text("x")
    assert runs.git_state(tmp_path)["dirty"] is True


def test_a_used_directory_is_refused(tmp_path):
    Run.open(tmp_path / "r", CONFIG).close()
    with pytest.raises(InputError, match="r is not empty .*--resume"):
        Run.open(tmp_path / "r", CONFIG)
    (tmp_path / "empty").mkdir()
    Run.open(tmp_path / "empty", CONFIG).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Run.open(tmp_path / "file", CONFIG)


def test_bad_input_before_the_first_line_leaves_no_directory(tmp_path):
    with pytest.raises(InputError, match="model nowhere"), Run.open(tmp_path / "r", CONFIG):
        raise InputError("model nowhere")
    assert not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="late"), Run.open(tmp_path / "r", CONFIG) as run:
        run.log(1, loss=2.0)
        raise InputError("late")
    assert (tmp_path / "r/metrics.jsonl").stat().st_size
    with pytest.raises(ZeroDivisionError), Run.open(tmp_path / "s", CONFIG):
        1 / 0  # noqa: B018
    assert (tmp_path / "s/run.json").exists()  # a fault is not bad input: what there is may explain it


def test_resume_needs_a_run_with_the_same_config(tmp_path):
    with pytest.raises(InputError, match="nothing to resume in .*none"):
        Run.open(tmp_path / "none", CONFIG, resume=True)
    assert not (tmp_path / "none").exists()
    Run.open(tmp_path / "r", CONFIG).close()
    with pytest.raises(InputError, match=r"opt\.lr: 0\.1 -> 0\.2 \(old -> new\)") as e:
        Run.open(tmp_path / "r", {"steps": 4, "opt": {"lr": 0.2}}, resume=True)
    assert "steps" not in str(e.value)
    with Run.open(tmp_path / "r", CONFIG, resume=True) as run:
        assert run.resumed
    assert len(json.loads((tmp_path / "r/run.json").read_text())["starts"]) == 2


def test_resume_keeps_one_line_per_step(tmp_path):
    with Run.open(tmp_path / "r", CONFIG) as run:
        for step in range(1, 6):
            run.log(step, loss=1 / step)
        run.summary(a=1)
    with open(run.metrics_path, "a") as f:
        f.write('{"step": 6, "lo')  # killed in the middle of a line
    with Run.open(tmp_path / "r", CONFIG, resume=True) as run:
        assert [m["step"] for m in run.metrics()] == [1, 2, 3, 4, 5]
        run.rewind(3)
        run.log(4, loss=0.25)
        assert [m["step"] for m in run.metrics()] == [1, 2, 3, 4]
        assert run.summary(b=2) == {"a": 1, "b": 2}


def test_a_corrupt_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl is corrupt"):
        runs.read_metrics(path)


def test_parts_have_their_own_steps(tmp_path):
    with Run.open(tmp_path / "r", CONFIG) as run:
        part = run.sub("int2")
        assert run.sub("int2") is part
        part.log(1, loss=2.0)
        part.summary(kl=0.5)
        run.log(1, loss=1.0)
    assert [m["loss"] for m in runs.read_metrics(tmp_path / "r/int2/metrics.jsonl")] == [2.0]
    assert json.loads((tmp_path / "r/int2/summary.json").read_text()) == {"kl": 0.5}
    assert [m["loss"] for m in run.metrics()] == [1.0]


def test_only_scalars_are_metrics(tmp_path):
    with Run.open(tmp_path / "r") as run, pytest.raises(InputError, match="metric grads is .*allowed: a scalar"):
        run.log(1, grads=jnp.zeros(3))


def test_a_full_disk_is_named(tmp_path):
    with Run.open(tmp_path / "r", CONFIG) as run:
        run._metrics.close()
        run._metrics = open("/dev/full", "ab", buffering=0)
        with pytest.raises(InputError, match="cannot write .*metrics.jsonl: No space left on device"):
            run.log(1, loss=1.0)


def test_metrics_survive_kill(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from lowbit.experiment.run import Run\n"
        "run = Run.open(sys.argv[1], {'a': 1})\n"
        "run.log(1, loss=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], timeout=120, capture_output=True)
    assert done.returncode == -9, done.stderr
    with Run.open(tmp_path / "r", {"a": 1}, resume=True) as run:
        assert [m["loss"] for m in run.metrics()] == [1.0]

"""wandb mirrors a run and can never stop it."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lowbit.errors import InputError
from lowbit.experiment import tracking
from lowbit.experiment.run import Run


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


class Broken:
    """A wandb whose calls fail from the n-th on."""

    def __init__(self, fail: set[str], settings=None):
        self.fail, self.calls = fail, []
        self.url = "https://example.invalid/run"
        self.settings = types.SimpleNamespace(sync_dir="wandb/offline-run-x")
        self.summary = self

    def Settings(self, **kw):
        return kw

    def init(self, **kw):
        self._call("init-" + kw["mode"], kw)
        return self

    def __getattr__(self, name):
        return lambda *a, **kw: self._call(name, a or kw)

    def _call(self, name, args):
        self.calls.append((name, args))
        if name in self.fail:
            raise RuntimeError(f"{name} is\nbroken")


def install(monkeypatch, *fail):
    fake = Broken(set(fail))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def play(path, tracking=None, **kw):
    with Run.open(path, {"lr": 0.1}, tracking=tracking, **kw) as run:
        for step in (1, 2, 3):
            run.log(step, loss=1.0 / step)
        run.summary(kl=0.5)
    return run


def test_off_by_default(tmp_path, monkeypatch):
    fake = install(monkeypatch)
    play(tmp_path / "r")
    assert fake.calls == [] and not (tmp_path / "r/wandb").exists()


def test_mode_comes_from_option_then_environment(monkeypatch):
    assert tracking.resolve_mode(None) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert tracking.resolve_mode(None) == "offline"
    assert tracking.resolve_mode("online") == "online"
    with pytest.raises(InputError, match="unknown tracking mode 'onlin'; did you mean 'online'"):
        tracking.resolve_mode("onlin")


def test_everything_is_mirrored(tmp_path, monkeypatch):
    fake = install(monkeypatch)
    with Run.open(tmp_path / "r", {"lr": 0.1}, tracking="online") as run:
        run.log(1, loss=2.0)
        run.sub("int2").log(7, loss=3.0)
        run.sub("int2").summary(kl=0.5, rows=[1])
    logged = [args[0] for name, args in fake.calls if name == "log"]
    assert logged == [{"step": 1, "loss": 2.0}, {"int2/step": 7, "int2/loss": 3.0}]
    assert ("update", ({"int2/kl": 0.5},)) in fake.calls
    axes = {args[0]: "step" for name, args in fake.calls if name == "define_metric"}
    assert set(axes) == {"step", "loss", "int2/step", "int2/loss"}
    assert fake.calls[-1] == ("finish", {"exit_code": 0})
    info = json.loads((tmp_path / "r/run.json").read_text())
    init = fake.calls[0][1]
    assert init["id"] == info["id"] and init["config"] == {"lr": 0.1} and init["resume"] is None


def test_resume_continues_the_same_wandb_run(tmp_path, monkeypatch):
    fake = install(monkeypatch)
    play(tmp_path / "r", "online")
    play(tmp_path / "r", "online", resume=True)
    first, second = (args for name, args in fake.calls if name == "init-online")
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_a_failed_run_is_marked_failed(tmp_path, monkeypatch):
    fake = install(monkeypatch)
    with pytest.raises(ZeroDivisionError), Run.open(tmp_path / "r", {}, tracking="online"):
        raise ZeroDivisionError
    assert fake.calls[-1] == ("finish", {"exit_code": 1})


@pytest.mark.parametrize("fail", ["define_metric", "log", "update", "finish", "init-offline"])
def test_a_raising_wandb_costs_one_line(tmp_path, monkeypatch, capsys, fail):
    install(monkeypatch, fail)
    run = play(tmp_path / "r", "offline")
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]
    assert json.loads((tmp_path / "r/summary.json").read_text()) == {"kl": 0.5}
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "broken" in warnings[0] and "continuing without it" in warnings[0]


def test_online_falls_back_to_offline(tmp_path, monkeypatch, capsys):
    fake = install(monkeypatch, "init-online")
    play(tmp_path / "r", "online")
    assert sum(name == "log" for name, _ in fake.calls) == 3
    err = capsys.readouterr().err
    assert "recording offline" in err and "wandb sync" in err


def test_a_missing_wandb_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = play(tmp_path / "r", "offline")
    assert len(run.metrics()) == 3
    assert capsys.readouterr().err.count("warning") == 1


def test_offline_for_real(tmp_path):
    """A real offline run in its own process; its history is read back with wandb's own reader."""
    code = (
        "import sys\n"
        "from lowbit.experiment.run import Run\n"
        "with Run.open(sys.argv[1], {'opt': {'lr': 0.1}}, tracking='offline') as run:\n"
        "    for step in (1, 2, 3):\n"
        "        run.log(step, loss=1.0 / step)\n"
        "    run.sub('int2').log(1, loss=9.0)\n"
        "    run.summary(kl=0.25)\n"
    )
    out = tmp_path / "r"
    done = subprocess.run([sys.executable, "-c", code, str(out)], timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    offline = list((out / "wandb").glob("offline-run-*"))
    run_id = json.loads((out / "run.json").read_text())["id"]
    assert len(offline) == 1 and offline[0].name.endswith(run_id)
    assert (offline[0] / f"run-{run_id}.wandb").stat().st_size > 0
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    if wandb is None:
        pytest.skip("no wandb command beside this Python")
    read = subprocess.run(
        [wandb, "leet", "inspect", "--json", str(offline[0])], timeout=120, capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    assert '"int2/loss"' in read.stdout or "int2/loss" in read.stdout
    records = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]
    history = [r["history"]["item"] for r in records if "history" in r]
    assert len(history) == 4, records

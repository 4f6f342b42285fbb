"""Kill, stop, fill the disk: real processes."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.train.checkpoint import Checkpoints

HERE = Path(__file__).parent


def start(directory: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "child.py"), str(directory), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)


def run(directory: Path, *args: str) -> tuple[int, str, str]:
    p = start(directory, *args)
    out, err = p.communicate(timeout=900)
    return p.returncode, out, err


def curve(directory: Path) -> list[str]:
    return (directory / "curve.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 6 steps that nobody disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    code, out, err = run(directory, "6", "save_every=2")
    assert (code, out) == (0, "finished 6 finished 6 steps\n"), err
    return directory


def test_killed_and_resumed_run_has_the_same_loss_curve_bit_for_bit(whole, tmp_path):
    code, _, _ = run(tmp_path, "6", "save_every=2", "kill=5", "slow=0.2")
    assert code == -signal.SIGKILL
    done = curve(tmp_path)
    assert 2 <= len(done) < 6 and done == curve(whole)[: len(done)]

    code, _, err = run(tmp_path, "6", "save_every=2", "resume=1")
    assert code == 0, err
    again = curve(tmp_path)[len(done) :]
    assert again == curve(whole)[-len(again) :] and len(again) < 6  # it did resume


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_exit_cleanly(tmp_path, number):
    p = start(tmp_path, "100000", "slow=0.05")
    for _ in range(1200):
        if (tmp_path / "curve.txt").exists() or p.poll() is not None:
            break
        time.sleep(0.1)
    p.send_signal(number)
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0, err
    status, step = out.split()[:2]
    assert status == "stopped" and "--resume" in out
    assert (tmp_path / "checkpoints" / step).is_dir() and curve(tmp_path)[-1].split()[0] == step


def test_full_disk_is_one_error_and_keeps_nothing_half_written(tmp_path):
    code, _, err = run(tmp_path, "4", "save_every=2", "fsize=20000")
    assert code == 2
    assert err.startswith("InputError: cannot write a checkpoint to") and err.count("\n") == 1, err
    assert "File too large (last good checkpoint: none)" in err
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_other_failed_writes_of_orbax_are_silent_and_nothing_else_is(tmp_path, caplog):
    """Whether asyncio reports them depends on when they fail; here it always does."""
    Checkpoints(tmp_path / "checkpoints").close()
    for source in ("orbax/checkpoint/serialization.py", "mine.py"):
        message = f"Task exception was never retrieved\nfuture: <Task coro=<f() done, defined at /x/{source}:1>>"
        logging.getLogger("asyncio").error(message)
    assert [r.getMessage().rsplit("/", 1)[1] for r in caplog.records] == ["mine.py:1>>"]

"""Bad input: exit code 2, one line that names the thing, its value and what is allowed, and nothing half-written."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.export.api import export
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model

CONFIG = ModelConfig("llama", 258, 32, 96, 1, 2, 1, 16, 64, tied=True)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder with a model `m`, one with another vocabulary `other`, a `.gguf`, a packed one, a text."""
    root = tmp_path_factory.mktemp("originals")
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ByteTokenizer())
    save_hf(model, root / "m", dtype="float32")
    wide = ModelConfig("llama", 300, 32, 96, 1, 2, 1, 16, 64, tied=True)
    save_hf(Model(wide, init_params(wide, jax.random.key(0)), ByteTokenizer()), root / "other", dtype="float32")
    export(model, "gguf:F32", root / "m.gguf")
    assert main(["quantize", str(root / "m"), "--format", "int2:g8", "--out", str(root / "packed")]) == 0
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture
def world(originals, tmp_path, monkeypatch) -> Path:
    """A fresh copy of everything, as the working directory."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


# -- what is broken ---------------------------------------------------------------------------------------------------

WEIGHTS = "m/model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"


def cut(path: str, keep: float) -> Callable[[Path], None]:
    def breaker(root: Path) -> None:
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[: int(len(data) * keep)])

    return breaker


def write(path: str, data: str | bytes) -> Callable[[Path], None]:
    def breaker(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data.encode() if isinstance(data, str) else data)

    return breaker


def weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def breaker(root: Path) -> None:
        tensors = load_file(root / WEIGHTS)
        change(tensors)
        save_file(tensors, root / WEIGHTS)

    return breaker


def config(**changes: object) -> Callable[[Path], None]:
    def breaker(root: Path) -> None:
        path = root / "m/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return breaker


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def poison(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[DOWN][0, 0] = value

    return change


def narrow(tensors: dict[str, np.ndarray]) -> None:
    tensors[DOWN] = tensors[DOWN][:, :64].copy()


def a_run(root: Path) -> None:
    """A training run that was stopped before its first checkpoint."""
    from lowbit.experiment.run import Run

    Run.open(root / "out", {"format": "int4:g8", "train": {"lr": 0.1}}).close()


EXPERIMENT = '''"""Small.

Purpose: x
Command: lowbit run x.py
Device: CPU
Expected time: 1 s
Expected numbers: 0
"""
import dataclasses

@dataclasses.dataclass(frozen=True)
class Opt:
    lr: float = 1e-4

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    opt: Opt = Opt()

def run(config, run):
    run.summary(steps=config.steps)
'''
SMALL = write("x.py", EXPERIMENT)
CLASH = EXPERIMENT.replace("steps: int = 3", "steps: int = 3\n    out: str = ''")

LLAMA2C = struct.pack("<7i", 32, 96, 1, 2, 1, 258, 64)  # a header and no weights
BAD_HEADER = struct.pack("<Q", 9) + b"not json!"
EVAL = "eval m --text text.txt --convention gptq-64"
TRAIN = "train m --text text.txt --format int4:g8 --steps 2 --batch-size 2 --seq 16 --out out"
QUANTIZE = "quantize m --format int4:g8 --out out"


@dataclass(frozen=True)
class Case:
    """`command` on a world that `broken` has damaged; the error must hold every one of `names`."""

    name: str
    command: str
    names: tuple[str, ...]
    broken: Callable[[Path], None] = lambda root: None


CASES = [
    # models
    Case("truncated safetensors", EVAL, ("model.safetensors", "bytes"), cut(WEIGHTS, 0.5)),
    Case("safetensors with a corrupt header", EVAL, ("model.safetensors",), write(WEIGHTS, BAD_HEADER)),
    Case("safetensors of 3 bytes", EVAL, ("model.safetensors",), write(WEIGHTS, b"abc")),
    Case("wrong shape", EVAL, ("down_proj", "[32, 64]", "[32, 96]"), weights(narrow)),
    Case("missing tensor", EVAL, ("down_proj",), weights(lambda t: t.pop(DOWN))),
    Case("unknown tensor", EVAL, ("layers.9",), weights(lambda t: t.update({"model.layers.9.x.weight": t[DOWN]}))),
    Case("NaN weights", EVAL, ("down_proj", "NaN"), weights(poison(np.nan))),
    Case("infinite weights, quantized", QUANTIZE, ("down_proj", "inf"), weights(poison(np.inf))),
    Case("unknown architecture", EVAL, ("model_type", "'mamba'", "llama"), config(model_type="mamba")),
    Case("unknown activation", EVAL, ("hidden_act", "'tanh'", "silu"), config(hidden_act="tanh")),
    Case("config without a size", EVAL, ("hidden_size",), config(hidden_size=None)),
    Case("config.json that is no JSON", EVAL, ("config.json",), write("m/config.json", "{")),
    Case("no config.json", EVAL, ("m is no model", "config.json"), remove("m/config.json")),
    Case("no weights", EVAL, ("m", "safetensors"), remove(WEIGHTS)),
    Case("unfinished run", "eval out --text text.txt", ("out", "no finished model", "--resume"), a_run),
    Case("unfinished run to quantize", "quantize out --format int4:g8 --out q", ("out", "--resume"), a_run),
    Case("unfinished run to train", TRAIN.replace("train m", "train r").replace("out out", "out o"), ("r", "--resume"),
         lambda root: (a_run(root), (root / "out").rename(root / "r"))[0]),
    Case("no model", "eval nowhere --text text.txt", ("'nowhere'", "allowed")),
    Case("hub id that is not cached", "eval owner/nowhere --text text.txt", ("owner/nowhere",)),
    Case("file of no known kind", "eval text.txt --text text.txt", ("text.txt", ".gguf")),
    Case("truncated GGUF", "eval m.gguf --text text.txt", ("m.gguf",), cut("m.gguf", 0.6)),
    Case("GGUF that ends in its header", "inspect m.gguf", ("m.gguf",), cut("m.gguf", 0.01)),
    Case("GGUF that is none", "inspect m.gguf", ("m.gguf",), write("m.gguf", b"GGML" + bytes(100))),
    Case("llama2.c file that is cut", "inspect x.bin", ("x.bin",), write("x.bin", LLAMA2C)),
    # text
    Case("empty text", EVAL, ("text.txt", "empty"), write("text.txt", " \n")),
    Case("text shorter than a window", EVAL, ("6 tokens", "64", "gptq-64"), write("text.txt", "abcde")),
    Case("text shorter than a row", TRAIN, ("text.txt", "tokens", "17"), write("text.txt", "abcde")),
    Case("no text", "eval m --text none.txt", ("none.txt", "No such file")),
    Case("text that is not UTF-8", EVAL, ("text.txt", "0xff", "UTF-8"), write("text.txt", TEXT.encode() + b"\xff")),
    Case("bad jsonl", "eval m --text x.jsonl", ("x.jsonl", "line 2"), write("x.jsonl", '{"text": "a"}\n{oops\n')),
    Case("jsonl without its field", "eval m --text x.jsonl", ("line 1", "'text'"), write("x.jsonl", '{"t": 1}')),
    Case("folder without text", "eval m --text d", ("d", ".jsonl"), lambda root: (root / "d").mkdir()),
    # evaluation
    Case("unknown convention", "eval m --text text.txt --convention wiki-64", ("'wiki-64'", "gptq-N")),
    Case("window beyond the context", "eval m --text text.txt --convention gptq-65", ("65", "at most", "64")),
    Case("reference with another vocabulary", f"{EVAL} --against other", ("300", "258")),
    Case("self-noise without a reference", f"{EVAL} --self-noise", ("--self-noise", "--against")),
    Case("KL base file that is none", "eval m --against x.kld", ("x.kld", "_logits_"), write("x.kld", b"GGUF" * 9)),
    Case("KL base file and a text", f"{EVAL} --against x.kld", ("--text", "x.kld"), write("x.kld", b"_logits_")),
    Case("comparison of one", "compare m --text text.txt", ("m", "at least 2")),
    # formats, rules, registries
    Case("unknown format", "quantize m --format int4x --out out", ("'int4x'", "int4")),
    Case("misspelt format", "quantize m --format itn4:g16 --out out", ("'itn4:g16'", "did you mean 'int4:g16'?")),
    Case("bits that do not exist", "quantize m --format int9:g8 --out out", ("int9",)),
    Case("group that does not divide", "quantize m --format int4:g64 --out out", ("int4:g64", "q_proj", "32", "64")),
    Case("no format", "quantize m --out out", ("--format", "--rules", "int4:g64")),
    Case("rules: bad regex", "quantize m --rules r.toml --out out", ("'('", "regular expression"),
         write("r.toml", '[[rule]]\nmatch = "("\nformat = "int4:g8"\n')),
    Case("rules: nothing matched", "quantize m --rules r.toml --out out", ("'nothing'", "matches nothing"),
         write("r.toml", '[[rule]]\nmatch = "nothing"\nformat = "int4:g8"\n')),
    Case("rules: unknown key", "quantize m --rules r.toml --out out", ("'fromat'", "format"),
         write("r.toml", '[[rule]]\nmatch = ".*"\nfromat = "int4:g8"\n')),
    Case("rules: not TOML", "quantize m --rules r.toml --out out", ("r.toml", "TOML"), write("r.toml", "[[rule\n")),
    Case("rules: no file", "quantize m --rules none.toml --out out", ("none.toml", "No such file")),
    Case("unknown solver", f"{QUANTIZE} --solver gptqq", ("'gptqq'", "rtn")),
    Case("unknown transform", f"{QUANTIZE} --transform quaro", ("'quarot'", "none")),
    Case("unknown recipe", f"{TRAIN} --recipe stee", ("'stee'", "'ste'")),
    Case("unknown export target", "export m --to gguf:Q4_9 --out out", ("'gguf:Q4_9'", "gguf:Q4_0")),
    Case("rows that a GGUF type cannot hold", "export m --to gguf:TQ2_0 --out out", ("TQ2_0", "q_proj", "256")),
    Case("quantized twice", "quantize packed --format int4:g8 --out out", ("q_proj", "quantized already")),
    # training
    Case("negative steps", TRAIN.replace("--steps 2", "--steps -3"), ("steps", "-3", "at least 1")),
    Case("learning rate that is no number", f"{TRAIN} --lr nan", ("lr", "nan", "above 0")),
    Case("loss that does not exist", f"{TRAIN} --loss mse", ("mse", "kl")),
    Case("teacher with another vocabulary", f"{TRAIN} --teacher other", ("300", "258")),
    Case("teacher that nothing uses", f"{TRAIN} --teacher m --loss ce", ("--teacher", "ce", "kl")),
    Case("no held-out text", f"{TRAIN} --eval-text none.txt", ("none.txt", "No such file")),
    Case("held-out text shorter than a row", f"{TRAIN} --eval-text s.txt", ("6 tokens", "16"), write("s.txt", "abcde")),
    Case("rows beyond the context", TRAIN.replace("--seq 16", "--seq 65"), ("--seq", "65", "64")),
    Case("mesh without devices", f"{TRAIN} --mesh 3 1 1", ("3", "devices")),
    Case("resume without a run", f"{TRAIN} --resume", ("out", "run.json")),
    Case("resume with another config", f"{TRAIN} --resume", ("train.lr: 0.1 -> 0.0003",), a_run),
    Case("tracking that does not exist", f"{TRAIN} --tracking cloud", ("'cloud'", "offline")),
    # generation
    Case("prompt and tokens beyond the context", "generate m --prompt hello --tokens 64", ("64", "max_position")),
    Case("no new tokens", "generate m --prompt hello --tokens 0", ("--tokens", "0", "at least 1")),
    Case("negative temperature", "generate m --prompt hello --temperature -1", ("temperature", "-1")),
    # outputs
    Case("output exists", QUANTIZE, ("out", "exists", "--force"), write("out/kept.txt", "mine")),
    Case("run directory exists", TRAIN, ("out", "not empty", "--resume"), write("out/kept.txt", "mine")),
    Case("output below a file", QUANTIZE.replace("--out out", "--out text.txt/q"), ("text.txt/q",)),
    Case("export below a file", "export m --to gguf:F32 --out text.txt/x.gguf", ("text.txt/x.gguf",)),
    Case("run directory below a file", TRAIN.replace("--out out", "--out text.txt/r"), ("text.txt/r",)),
    # experiments and options
    Case("no experiment", "run none.py", ("none.py", "No such file")),
    Case("experiment without a docstring", "run x.py --out out", ("x.py", "docstring", "Device"), write("x.py", "")),
    Case("experiment: unknown key", "run x.py --opt.lrr=1 --out out", ("'--opt.lrr'", "'--opt.lr'"), SMALL),
    Case("experiment: bad value", "run x.py --steps many --out out", ("--steps", "'many'"), SMALL),
    Case("experiment: resume without a run", "run x.py --resume --out out", ("out", "run.json"), SMALL),
    Case("experiment: an option of lowbit run", "run x.py --out out", ("--out", "Config"), write("x.py", CLASH)),
    Case("report of no JSON", "report r.json --out out", ("r.json", "JSON"), write("r.json", "{")),
    Case("misspelt option", f"{EVAL} --agianst m", ("'--agianst'", "'--against'")),
    Case("missing option", "eval m", ("--text",)),
    Case("stray argument", f"{EVAL} stray", ("'stray'",)),
    Case("misspelt command", "quantise m", ("'quantise'", "'quantize'")),
]  # fmt: skip


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def error(command: str, capsys) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    code = main(command.split())
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("lowbit: error: "), err
    return err


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input(case, world, capsys):
    case.broken(world)
    before = snapshot(world)
    line = error(case.command, capsys)
    for name in case.names:
        assert name in line, f"{name!r} is not in: {line}"
    assert snapshot(world) == before
    assert not [p for p in world.rglob("*") if p.name.endswith((".tmp", ".partial"))]


FULL = {
    "quantize": QUANTIZE,
    "quantize a file": "quantize m.gguf --format int4:g8 --out out",
    "export gguf": "export m --to gguf:F32 --out out/m.gguf",
    "export hf": "export m --to hf --out out",
    "train": TRAIN,
    "run": "run x.py --out out",
    "report": "report r.json --out out",
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk(name, world, capsys, monkeypatch):
    SMALL(world)
    write("r.json", '{"name": "a", "file_bytes": 1, "kl_mean": 0.1}')(world)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = error(FULL[name], capsys)
    assert "No space left on device" in line and "out" in line
    left = [p.name for p in world.glob("out/**/*") if p.is_file()]
    assert left == []


def test_a_failure_keeps_what_was_there(world, capsys):
    """--force with bad input does not cost the old output."""
    assert main("quantize m --format int2:g8 --out out".split()) == 0
    before = snapshot(world / "out")
    weights(poison(np.nan))(world)
    assert "NaN" in error("quantize m --format int4:g8 --out out --force", capsys)
    assert snapshot(world / "out") == before


def test_bugs_keep_their_traceback(world, monkeypatch):
    """Only bad input becomes one line."""
    monkeypatch.setattr("lowbit.evaluate.perplexity.evaluate", lambda *a, **k: jnp.zeros(3)["x"])
    with pytest.raises(TypeError):
        main(EVAL.split())

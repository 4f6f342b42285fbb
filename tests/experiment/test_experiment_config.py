"""The experiment contract: docstring, frozen Config, options, JSON."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from lowbit.errors import InputError
from lowbit.experiment import config as configs

DOC = '''"""A small one.

Purpose: shows the contract,
  on two lines.
Command: lowbit run x.py
Device: CPU
Expected time: 1 s
Expected numbers: loss 0
"""
'''
BODY = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Opt:
    lr: float = 1e-4

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    opt: Opt = Opt()

def run(config, run):
    pass
"""


@dataclasses.dataclass(frozen=True)
class Opt:
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr <= 0:
            raise InputError(f"lr is {self.lr} (allowed: above 0)")


@dataclasses.dataclass(frozen=True)
class Config:
    """A config."""

    steps: int = 5
    mode: Literal["kl", "ce"] = "kl"
    formats: tuple[str, ...] = ("q4_0", "int2:g64")
    path: Path | None = None
    pretrain: bool = False
    opt: Opt = Opt()


def write(tmp_path, text, name="x.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_load_reads_docstring_config_and_run(tmp_path):
    experiment = configs.load(write(tmp_path, DOC + BODY))
    assert experiment.name == "x"
    assert experiment.doc["Purpose"] == "shows the contract, on two lines."
    assert experiment.config().opt.lr == 1e-4
    assert experiment.dry_run is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BODY, "has no docstring"),
        (DOC.replace("Device: CPU", "") + BODY, "docstring lacks 'Device:'"),
        (DOC.replace("Purpose", "Aim") + BODY, "docstring lacks 'Purpose or Paper:'"),
        (DOC.replace("loss 0", "") + BODY, "docstring lacks 'Expected numbers:'"),
        (DOC + BODY.replace("(frozen=True)\nclass Config", "\nclass Config"), "allowed: a frozen dataclass"),
        (DOC + BODY.replace("def run", "def walk"), "allowed: a function run(config, run)"),
        (DOC + "def (", "is not Python"),
    ],
)
def test_contract_is_checked(tmp_path, text, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")) as e:
        configs.load(write(tmp_path, text))
    assert "\n" not in str(e.value) and "x.py" in str(e.value)


def test_docstring_is_checked_before_code_runs(tmp_path):
    with pytest.raises(InputError, match="has no docstring"):
        configs.load(write(tmp_path, "open('ran', 'w')\nraise SystemExit(7)\n"))


def test_two_experiments_with_one_name_do_not_mix(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = configs.load(write(tmp_path / "a", DOC + BODY))
    b = configs.load(write(tmp_path / "b", DOC + BODY.replace("steps: int = 3", "steps: int = 4")))
    assert (a.config().steps, b.config().steps) == (3, 4)


def test_every_experiment_of_the_repository_keeps_the_contract():
    root = Path(__file__).parents[2]
    for path in sorted((root / "experiments").glob("**/*.py")):
        experiment = configs.load(path)
        assert path.relative_to(root).as_posix() in experiment.doc["Command"]
        config = experiment.config()
        assert configs.from_json(experiment.config, configs.to_json(config)) == config


@pytest.mark.parametrize("argv", [["--opt.lr=3e-4"], ["--opt.lr", "3e-4"]])
def test_overrides(argv):
    assert configs.parse(Config, argv, "x") == Config(opt=Opt(lr=3e-4))


def test_more_overrides():
    argv = "--formats bf16 ternary --mode ce --path a/b --pretrain --opt.betas 0.8 0.9".split()
    expected = Config(
        formats=("bf16", "ternary"), mode="ce", path=Path("a/b"), pretrain=True, opt=Opt(betas=(0.8, 0.9))
    )
    assert configs.parse(Config, argv, "x") == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--opt.lrr=1"], r"unknown option '--opt.lrr'; did you mean '--opt.lr'\? \(allowed: .*--steps"),
        (["--step", "3"], r"unknown option '--step'; did you mean '--steps'\?"),
        (["--steps", "many"], "--steps: .*'many'"),
        (["--opt.lr=fast"], "--opt.lr: .*'fast'"),
        (["--mode", "mse"], "'mse' .*'--mode'.*'kl', 'ce'"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--opt.lr=-1"], r"lr is -1.0 \(allowed: above 0\)"),
    ],
)
def test_bad_options_are_one_line(argv, message, capsys):
    with pytest.raises(InputError, match=message) as e:
        configs.parse(Config, argv, "lowbit run x.py")
    assert "\n" not in str(e.value)
    assert capsys.readouterr() == ("", "")


def test_a_long_bad_value_survives_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    value = "x" * 90
    with pytest.raises(InputError, match=value):
        configs.parse(Config, ["--steps", value], "x")


def test_json_round_trip():
    config = Config(steps=1, path=Path("a"), opt=Opt(lr=2.0))
    data = configs.to_json(config)
    assert data["opt"] == {"lr": 2.0, "betas": [0.9, 0.95]}
    assert configs.from_json(Config, data) == config
    assert configs.from_json(Config, {"opt": {"lr": 1}}) == Config(opt=Opt(lr=1.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 1}, "unknown config key 'stepz'; did you mean 'steps'"),
        ({"opt": {"lrr": 1}}, "unknown config key 'opt.lrr'; did you mean 'opt.lr'"),
        ({"steps": "5"}, r"steps is '5' \(allowed: int\)"),
        ({"steps": True}, r"steps is True \(allowed: int\)"),
        ({"mode": "mse"}, "mode is 'mse'"),
        ({"opt": {"betas": [0.1]}}, r"opt.betas is \[0.1\]"),
        ({"opt": 3}, "config opt is 3"),
    ],
)
def test_bad_json(data, message):
    with pytest.raises(InputError, match=message):
        configs.from_json(Config, data)


def test_non_finite_and_foreign_values_have_no_json():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        x: object

    with pytest.raises(InputError, match="config x is nan"):
        configs.to_json(Odd(float("nan")))
    with pytest.raises(InputError, match="config x is a set"):
        configs.to_json(Odd({1}))


def test_fingerprint_and_differences():
    a, b = Config(), Config(opt=Opt(lr=1.0))
    assert configs.fingerprint(a) == configs.fingerprint(Config()) != configs.fingerprint(b)
    assert configs.fingerprint(a, ["opt"]) == configs.fingerprint(b, ["opt"]) != configs.fingerprint(a)
    assert configs.differences(configs.to_json(a), configs.to_json(b)) == ["opt.lr: 0.0001 -> 1.0"]
    assert configs.differences({"a": 1}, {"b": None}) == ["a: 1 -> absent", "b: absent -> null"]

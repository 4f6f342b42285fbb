"""`lowbit train` with recipes that work block by block: both phases, interruption, resume, refusals."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.experiment.run import read_metrics
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.qat import block_ap as ap

CONFIG = ModelConfig("llama", 258, 16, 32, 2, 2, 1, 8, 32, tied=True)
BLOCKS = "--blocks.rows 4 --blocks.valid-rows 2 --blocks.weight-lr 1e-2 --blocks.epochs 1".split()
TRAIN = "train m --text text.txt --format int2:g8:asym:rounded --batch-size 2 --seq 16 --log-every 1 --steps 3".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    params = jax.tree.map(lambda a: a * (10.0 if a.ndim == 2 else 1.0), init_params(CONFIG, jax.random.key(0)))
    save_hf(Model(CONFIG, params, ByteTokenizer()), root / "m", dtype="bfloat16")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return root


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return home


def run(capsys, *argv: str) -> dict:
    capsys.readouterr()
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def weights(folder: str) -> bytes:
    return Path(folder, "model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_both_phases_stop_and_resume(here, capsys, monkeypatch):
    """Stopped in the second block, then in end-to-end training: the resumed run has the weights of an undisturbed one.
    Block-AP alone gives the codes that end-to-end training keeps."""
    argv = [*TRAIN, "--recipe", "efficientqat", *BLOCKS, "--schedule", "constant", "--lr", "1e-2"]
    whole = run(capsys, *argv, "--out", "whole")
    assert whole["status"] == "finished" and whole["step"] == 3 and len(whole["blocks"]) == 2
    assert whole["bits_per_weight_quantized"] > 2 + (16 + 2) / 8  # the zero points of a row are padded to a byte

    real, count = ap.train_block, []

    def train_block(*args):
        count.append(1)
        return None if len(count) == 2 else real(*args)

    monkeypatch.setattr(ap, "train_block", train_block)
    stopped = run(capsys, *argv, "--out", "parts")
    assert stopped["status"] == "stopped" and [b["block"] for b in stopped["blocks"]] == [0]
    assert sorted(p.name for p in Path("parts/blocks").iterdir()) == ["00000", "metrics.jsonl"]
    argv[argv.index("--steps") + 1] = "1"
    first = run(capsys, *argv, "--out", "parts", "--resume")
    assert first["step"] == 1 and len(count) == 3
    argv[argv.index("--steps") + 1] = "3"
    done = run(capsys, *argv, "--out", "parts", "--resume")
    assert len(count) == 3 and done["loss"] == whole["loss"] and weights("parts") == weights("whole")
    logged = [
        [(m["step"], m["valid_mse"]) for m in read_metrics(f"{d}/blocks/metrics.jsonl")] for d in ("whole", "parts")
    ]
    assert logged[0] == logged[1] and [s for s, _ in logged[0]] == [1, 2]
    assert [(m["step"], m["loss"]) for m in read_metrics("whole/metrics.jsonl")] == [
        (m["step"], m["loss"]) for m in read_metrics("parts/metrics.jsonl")
    ]

    alone = run(capsys, *TRAIN, "--recipe", "block-ap", *BLOCKS, "--out", "alone")
    assert alone["status"] == "finished" and alone["blocks"][1]["valid_mse"] == whole["blocks"][1]["valid_mse"]
    assert not Path("alone/checkpoints").exists() and alone["loss"] is None
    from safetensors.numpy import load_file

    a, b = (load_file(f"{d}/model/model.safetensors") for d in ("alone", "whole"))
    differing = {k.rpartition(".")[2] for k in a if not np.array_equal(a[k].view(np.uint8), b[k].view(np.uint8))}
    assert differing == {"scale"}
    scored = "--text text.txt --convention gptq-32 --against m".split()
    assert run(capsys, "eval", "whole", *scored)["kl_mean"] > 0


@pytest.mark.slow
def test_scales_of_a_packed_model(here, capsys):
    """The codes of a solver, and the model before it as the teacher."""
    assert main("quantize m --format int2:g8:asym:rounded --out q".split()) == 0
    argv = [*TRAIN, "--recipe", "e2e-qp"]
    argv[1] = "q"
    assert main([*argv, "--out", "never"]) == 2
    assert "model q is packed and would be its own teacher (allowed: --teacher MODEL, or --loss ce)" in (
        capsys.readouterr().err
    )
    out = run(capsys, *argv, "--teacher", "m", "--out", "scales")
    assert out["step"] == 3 and out["loss"] > 0 and "blocks" not in out


@pytest.mark.slow
def test_dry_run_tells_a_block(here, capsys):
    both = run(capsys, *TRAIN, "--recipe", "efficientqat", *BLOCKS, "--out", "dry", "--dry-run")
    assert both["block"]["streams"] == 2 * 4 * 6 * 16 * 16 and both["block"]["optimizer"] > 0
    assert 0 < both["per_device"]["optimizer"] < 2 * both["block"]["optimizer"]  # of scales alone, in both blocks
    alone = run(capsys, *TRAIN, "--recipe", "block-ap", *BLOCKS, "--out", "dry", "--dry-run")
    assert alone["per_device"] is None and alone["block"] == both["block"]
    assert not Path("dry").exists()


@pytest.mark.parametrize(
    "words, text",
    [
        ("--recipe ste --blocks.rows 4", "--blocks options with recipe ste"),
        ("--recipe block-ap --blocks.valid-rows 0", "blocks valid_rows is 0"),
        ("--recipe block-ap --blocks.rows 400", "needed: 6656 tokens for 416 rows"),
        ("--recipe block-ap --blocks.length 64", "--blocks.length is 64 (allowed: at most the model's context, 32)"),
        ("--recipe efficientqat --blocks.weight-lr -1", "blocks weight_lr is -1.0"),
        ("--recipe efficientqa", "did you mean 'efficientqat'"),
    ],
)
def test_refused_before_anything_is_written(here, capsys, words, text):
    assert main([*TRAIN, *words.split(), "--out", "never"]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1, err
    assert not Path("never").exists()


@pytest.mark.slow
def test_stages_by_rules_and_formats_resume(here, capsys):
    """A run with stages goes on in the stage where its steps ended, to the bits of an undisturbed one."""
    Path("two.toml").write_text('[[rule]]\nmatch = "model.layers.*_proj"\nformat = "int2:g8"\n')
    argv = [*TRAIN, "--recipe", "ste", "--schedule", "constant", "--stages", "1:int3:g8", "2:two.toml"]
    whole = run(capsys, *argv, "--out", "stages")
    assert whole["status"] == "finished" and whole["bits_per_weight_quantized"] == 2 + 16 / 8
    one = argv.copy()
    one[one.index("--steps") + 1] = "4"
    more = run(capsys, *one, "--out", "stages", "--resume")
    assert more["step"] == 4
    assert weights("stages") != b"" and run(capsys, *one, "--out", "straight")["loss"] == more["loss"]
    assert weights("stages") == weights("straight")


def test_options_that_would_do_nothing_are_refused(here, capsys):
    assert main([*TRAIN, "--recipe", "ste", "--revise-every", "3", "--out", "no"]) == 2
    assert "--revise-every with recipe ste (allowed: with pv" in capsys.readouterr().err
    assert main([*TRAIN, "--recipe", "pv", "--revise-every", "30", "--out", "no"]) == 2
    assert "revise_every is 30 with " in capsys.readouterr().err
    assert not Path("no").exists()


def test_a_teacher_of_another_shape_teaches_the_second_phase_alone(here, capsys):
    """Block by block the model's own blocks give the labels; a recipe that has no second phase refuses the teacher."""
    import dataclasses

    other = dataclasses.replace(CONFIG, num_layers=1)
    save_hf(Model(other, init_params(other, jax.random.key(1)), ByteTokenizer()), here / "t", dtype="bfloat16")
    argv = [*TRAIN, *BLOCKS, "--teacher", "t"]
    assert run(capsys, *argv, "--recipe", "efficientqat", "--out", "taught")["status"] == "finished"
    assert main([*argv, "--recipe", "block-ft", "--out", "refused"]) == 2
    assert "of another shape" in capsys.readouterr().err

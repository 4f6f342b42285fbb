"""The commands as scripts call them: JSON on standard output, progress on stderr, exit codes, resume."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lowbit import tree as trees
from lowbit import xla
from lowbit.cli import VERBS, main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import read_metrics
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model

CONFIG = ModelConfig("llama", 258, 32, 64, 1, 2, 1, 16, 64, tied=True)
EVAL_KEYS = {
    "nats_per_token", "perplexity", "convention", "bits_per_byte", "tokens", "kl_mean", "kl_median", "kl_p90", "kl_p99",
    "kl_p99_9", "same_top1", "file_bytes", "bits_per_weight", "bits_per_weight_quantized",
}  # fmt: skip
TRAIN = "train m --text text.txt --format int4:g8 --batch-size 2 --seq 16 --log-every 1 --lr 1e-3".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    save_hf(Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ByteTokenizer()), root / "m", dtype="bfloat16")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return root


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return home


def run(capsys, *argv: str) -> dict:
    """The JSON object of a command that succeeds; nothing else may be on standard output."""
    capsys.readouterr()
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


# -- help and dispatch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], *([verb] for verb in VERBS)], ids=lambda a: a[0] if a else "lowbit")
def test_help_imports_nothing_heavy(argv):
    heavy = ("jax", "jaxlib", "flax", "numpy", "transformers", "torch", "wandb", "matplotlib", "datasets", "orbax")
    code = (
        "import sys\n"
        "from lowbit.cli import main\n"
        f"code = main({[*argv, '--help']!r})\n"
        f"loaded = [m for m in {heavy!r} if m in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if loaded else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"lowbit {argv[0]}" in done.stdout if argv else all(verb in done.stdout for verb in VERBS)
    assert argv == [] or "--json" in done.stdout


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "lowbit", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("lowbit 0.")


def test_interrupt_says_how_to_go_on(here, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.commands.train.prepare", interrupted)
    assert main([*TRAIN, "--steps", "2", "--out", "never"]) == 130
    assert capsys.readouterr().err == "lowbit: interrupted (the same command with --resume continues)\n"
    monkeypatch.setattr("lowbit.evaluate.perplexity.evaluate", interrupted)
    assert main("eval m --text text.txt".split()) == 130
    assert "--resume" not in capsys.readouterr().err


# -- verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(home) -> str:
    assert main(["quantize", str(home / "m"), "--format", "int4:g8", "--out", str(home / "packed")]) == 0
    return "packed"


def test_quantize(here, capsys):
    (here / "r.toml").write_text('[[rule]]\nmatch = ".*down_proj"\nformat = "int8:channel"\n')
    out = run(capsys, *"quantize m --rules r.toml --format int2:g8 --solver rtn --transform none --out q".split())
    assert out["file_bytes"] == sum(p.stat().st_size for p in (here / "q").glob("*.safetensors"))
    assert 2 < out["bits_per_weight_quantized"] < 8 and out["bits_per_weight"] < 16
    tensors = {t["path"]: t["format"] for t in run(capsys, "inspect", "q")["tensors"]}
    assert tensors["model.layers.0.mlp.down_proj"] == "int8:channel"
    assert tensors["model.layers.0.mlp.up_proj"] == "int2:g8"
    assert tensors["model.embed_tokens"] == "bfloat16"


def test_calibration_text_is_not_silently_ignored(here, capsys):
    argv = "quantize m --format int4:g8 --calib text.txt --out calibrated".split()
    assert main(argv) == 0
    assert "--calib text.txt is not used" in capsys.readouterr().err


def test_a_registered_solver_is_dispatched_and_gets_its_data(here, capsys, monkeypatch):
    from lowbit.ptq import base, rtn

    seen = []

    def solve(model, assignment, documents=None, progress=None):
        seen.append((sorted(assignment)[0], documents))
        return rtn.quantize(model.params, assignment)

    monkeypatch.setitem(base._SOLVERS, "mine", base.Solver("mine", solve, calibrates=True))
    argv = "quantize m --format int4:g8 --solver mine --out mine".split()
    assert main(argv) == 2
    assert "solver mine without --calib" in capsys.readouterr().err and not (here / "mine").exists()
    out = run(capsys, *argv, "--calib", "text.txt")
    assert out["solver"] == "mine" and out["bits_per_weight_quantized"] == 6.0
    assert seen == [("model.layers.0.mlp.down_proj", [(here / "text.txt").read_text()])]


def test_eval_against_the_model_itself(here, capsys):
    argv = "eval m --text text.txt --against m --convention gptq-32 --self-noise".split()
    out = run(capsys, *argv)
    assert out.keys() >= EVAL_KEYS
    assert out["kl_mean"] == 0 and out["same_top1"] == 1 and out["convention"] == "gptq-32"
    assert out["bits_per_weight"] == 16 and out["bits_per_weight_quantized"] is None
    assert 0 < out["self_noise"]["kl_mean"] < 1e-2


def test_eval_of_a_packed_model(here, packed, capsys):
    out = run(capsys, *f"eval {packed} --text text.txt --against m --convention gptq-32".split())
    assert 0 < out["kl_mean"] < 1 and out["bits_per_weight_quantized"] == 6.0  # 4 bits and an fp16 scale for 8 weights
    assert main(f"eval {packed} --text text.txt --convention gptq-32".split()) == 0
    assert "perplexity" in capsys.readouterr().out


def test_eval_against_a_kl_base_file(here, packed, capsys):
    """The file says what is measured; the model that wrote it differs from it by its 16 bits alone."""
    from lowbit.commands.common import load
    from lowbit.evaluate.kld_file import evaluate_against_kld, write_kld

    write_kld(load("m"), (here / "text.txt").read_text(), "base.kld", 32)
    out = run(capsys, *f"eval {packed} --against base.kld".split())
    assert out.keys() >= EVAL_KEYS and out["convention"] == "llamacpp-32" and out["text"] is None
    assert out["kl_mean"] == evaluate_against_kld(load(packed), "base.kld")["kl_mean"] > 1e-6
    same = run(capsys, *"eval m --against base.kld".split())
    assert abs(same["kl_mean"]) < out["kl_mean"] and same["same_top1"] > 0.99


def test_eval_and_export_show_progress(here, packed, capsys):
    assert main(f"eval {packed} --text text.txt --convention gptq-32 --json".split()) == 0
    assert "eval 7/7" in capsys.readouterr().err  # 54 windows, 8 a batch
    assert main(f"export {packed} --to packed --out shown --json".split()) == 0
    assert "export 1/1  to packed  path shown" in capsys.readouterr().err


def test_compare_and_report(here, packed, capsys):
    argv = f"compare m {packed} --text text.txt --convention gptq-32 --out comparison".split()
    out = run(capsys, *argv)
    assert [row["name"] for row in out["rows"]] == ["m", packed] and out["rows"][1]["kl_mean"] > 0
    assert (here / "comparison/report.png").stat().st_size > 5000
    again = run(capsys, "report", "comparison", "--out", "report2")
    assert again["rows"] == 2 and (here / "report2/report.html").exists()


def test_export_several_targets(here, packed, capsys):
    out = run(capsys, *f"export {packed} --to gguf:F32 --to hf --to packed --out exports".split())
    assert [e["to"] for e in out["exports"]] == ["gguf:F32", "hf", "packed"]
    assert {p.name for p in (here / "exports").iterdir()} == {"packed-F32.gguf", "hf", "packed"}
    assert all(e["kl_mean"] <= 1e-4 for e in out["exports"])
    kl = run(capsys, *f"eval exports/packed-F32.gguf --text text.txt --against {packed} --convention gptq-32".split())
    assert kl["kl_mean"] < 1e-6
    one = run(capsys, *f"export {packed} --to packed --out exports/one".split())
    assert one["path"] == "exports/one" and one["kl_mean"] == 0


def test_generate(here, packed, capsys):
    out = run(capsys, "generate", packed, "--prompt", "The quick", "--tokens", "5")
    assert len(out["token_ids"]) <= 5 and out["text"] == "The quick" + out["completion"]
    assert out["token_ids"] == run(capsys, "generate", packed, "--prompt", "The quick", "--tokens", "5")["token_ids"]
    options = "--tokens 5 --temperature 2 --top-k 9 --seed".split()
    sampled = [run(capsys, "generate", packed, *options, seed)["token_ids"] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_inspect_estimate_formats(here, packed, capsys):
    stats = run(capsys, "inspect", packed, "--stats")
    assert stats["config"]["hidden_size"] == 32 and all(t["std"] > 0 or "norm" in t["path"] for t in stats["tensors"])
    estimate = run(capsys, "estimate", "m", "--format", "int4:g8")
    assert estimate["bytes"] == stats["stored_bytes"]
    assert estimate["bits_per_weight"] == pytest.approx(stats["bits_per_weight"])
    formats = run(capsys, "formats")
    listed = {f["name"]: f for f in formats["formats"]}
    assert {"name": "int8:token:bitnet", "bits": 8} in formats["activations"]
    assert listed["int4:g64"]["bits_per_weight"] == 4.25 and listed["q4_0"]["trainable"] is True


def test_estimate_reads_no_weights(here, capsys):
    (here / "only").mkdir()
    (here / "only/config.json").write_text((here / "m/config.json").read_text())
    assert run(capsys, "estimate", "only", "--format", "int4:g8")["params"] == CONFIG.num_params


def test_dry_run_of_training_writes_nothing(here, capsys):
    out = run(capsys, *TRAIN, "--steps", "3", "--out", "dry", "--dry-run")
    assert out["per_device"]["optimizer"] >= 8 * CONFIG.num_params and out["per_device"]["temporaries"] > 0
    assert {t["format"] for t in out["tensors"]} == {"bf16", "int4:g8"}
    assert not (here / "dry").exists()


@pytest.mark.slow
def test_the_plan_tells_the_bytes_of_what_is_written(here, capsys):
    """A model with weights in float32 and norms in bfloat16, and a rule that keeps one linear."""
    params = trees.map_leaves(
        lambda p, a: a.astype("bfloat16") if a.ndim == 1 else a, init_params(CONFIG, jax.random.key(1))
    )
    save_hf(Model(CONFIG, params, ByteTokenizer()), here / "mixed", dtype=None)
    (here / "keep.toml").write_text('[[rule]]\nmatch = ".*down_proj"\nformat = "bf16"\n')
    options = "mixed --format int4:g8 --rules keep.toml".split()
    estimate = run(capsys, "estimate", *options)
    kinds = {t["site"]: t["format"] for t in estimate["tensors"]}
    assert kinds["model.layers.0.mlp.down_proj"] == kinds["model.embed_tokens"] == "f32" != kinds["model.norm"]
    quantized = run(capsys, "quantize", *options, "--out", "mixed-q")
    argv = ["train", *options, *"--text text.txt --batch-size 2 --seq 16 --steps 1 --loss ce --out mixed-t".split()]
    plan = run(capsys, *argv, "--dry-run")
    trained = run(capsys, *argv)
    assert estimate["bytes"] == quantized["stored_bytes"] == plan["bytes"] == trained["stored_bytes"]
    dtypes = [{t["path"]: t["format"] for t in run(capsys, "inspect", m)["tensors"]} for m in ("mixed-q", "mixed-t")]
    assert dtypes[0] == dtypes[1] and dtypes[0]["model.norm"] == "bfloat16"


def test_dry_run_counts_the_teacher_as_it_is_stored(here, capsys):
    """The arguments of a step: masters and two moments in float32, the teacher in bfloat16, two counters, the batch."""
    out = run(capsys, *TRAIN, "--steps", "3", "--out", "dry", "--dry-run")
    batch = 2 * 2 * 17 * 4
    counters = out["per_device"]["optimizer"] - 8 * CONFIG.num_params
    assert 0 < counters <= 32
    assert out["per_device"]["arguments"] == (4 + 8 + 2) * CONFIG.num_params + counters + batch


def test_train_resume_and_use(here, capsys):
    """Stopped after 2 of 4 steps and resumed, a run ends with the lines and the weights of one that was not stopped."""
    whole = run(capsys, *TRAIN, "--steps", "4", "--schedule", "constant", "--out", "whole")
    assert whole["status"] == "finished" and whole["bits_per_weight_quantized"] == 6.0
    run(capsys, *TRAIN, "--steps", "2", "--schedule", "constant", "--out", "parts")
    parts = run(capsys, *TRAIN, "--steps", "4", "--schedule", "constant", "--out", "parts", "--resume")
    losses = [[(m["step"], m["loss"]) for m in read_metrics(f"{d}/metrics.jsonl")] for d in ("whole", "parts")]
    assert losses[0] == losses[1] and [s for s, _ in losses[0]] == [1, 2, 3, 4]
    assert parts["loss"] == whole["loss"]
    weights = [(here / d / "model/model.safetensors").read_bytes() for d in ("whole", "parts")]
    assert weights[0] == weights[1]
    out = run(capsys, *"eval whole --text text.txt --against m --convention gptq-32".split())  # a run is a MODEL
    assert 0 < out["kl_mean"] < 1 and out["file_bytes"] == whole["file_bytes"]
    info = json.loads((here / "parts/run.json").read_text())
    assert len(info["starts"]) == 2 and "--resume" in info["starts"][1]["command"]


@pytest.mark.slow
def test_adapters_from_training_to_export(here, capsys):
    """The plan tells the bytes with adapters; unmerged ones do not leave, merged ones do."""
    argv = "train m --text text.txt --batch-size 2 --seq 16 --steps 2 --recipe loftq:r2 --format nf4:g8 --out a".split()
    plan, done = run(capsys, *argv, "--dry-run"), run(capsys, *argv)
    assert plan["bytes"] == done["stored_bytes"] and plan["bits_per_weight"] == pytest.approx(done["bits_per_weight"])
    assert plan["bits_per_weight_quantized"] == pytest.approx(done["bits_per_weight_quantized"])
    assert any(t["format"] == "nf4:g8+lora:r2" for t in run(capsys, "inspect", "a")["tensors"])
    assert main(["export", "a", "--to", "hf", "--out", "x"]) == 2 and "lowbit merge" in capsys.readouterr().err
    assert run(capsys, "merge", "a", "--out", "b")["folder"] == "plain"
    assert run(capsys, "eval", "b", "--text", "text.txt", "--against", "a")["kl_mean"] < 1e-6
    run(capsys, "export", "b", "--to", "hf", "--out", "c")
    argv = "train m --text text.txt --batch-size 2 --seq 16 --steps 2 --recipe qa-lora:r2 --format int4:g8:min --out q"
    done = run(capsys, *argv.split())
    assert (
        done["bits_per_weight_quantized"] == run(capsys, *argv.split(), "--dry-run")["bits_per_weight_quantized"] == 8
    )


@pytest.mark.slow
def test_activation_formats_from_training_to_export(here, capsys):
    """Inputs rounded in training are rounded in evaluation, by the packed export too; GGUF refuses unless told to."""
    rules = '[[rule]]\nmatch = ".*proj"\nformat = "int4:g8"\n[[rule]]\nmatch = ".*proj:in"\nformat = "int4:token"\n'
    (here / "in.toml").write_text(rules)
    argv = "train m --text text.txt --rules in.toml --batch-size 2 --seq 16 --steps 2 --out acts".split()
    assert run(capsys, *argv)["status"] == "finished"
    scored = "--text text.txt --convention gptq-32".split()
    trained = run(capsys, "eval", "acts", *scored)["nats_per_token"]

    run(capsys, *"export acts --to packed --out acts-packed".split())
    assert run(capsys, "eval", "acts-packed", *scored)["nats_per_token"] == trained
    assert main("export acts --to gguf:F32 --out acts.gguf".split()) == 2
    assert "int4:token" in capsys.readouterr().err and not (here / "acts.gguf").exists()
    run(capsys, *"export acts --to gguf:F32 --out acts.gguf --drop-activations".split())
    assert run(capsys, "eval", "acts.gguf", *scored)["nats_per_token"] != trained

    rounded = run(capsys, *"quantize m --rules in.toml --out acts-rtn".split())
    assert rounded["bits_per_weight_quantized"] == 6.0
    weights_only = run(capsys, *"quantize m --format int4:g8 --out weights-rtn".split())
    assert weights_only["file_bytes"] == pytest.approx(rounded["file_bytes"], rel=0.1)
    with_inputs, without = (run(capsys, "eval", d, *scored)["nats_per_token"] for d in ("acts-rtn", "weights-rtn"))
    assert with_inputs != without


@pytest.mark.slow
def test_held_out_loss_at_each_save_and_the_best_checkpoint(here, capsys):
    """At this learning rate the loss of the text rises, so that the first checkpoint stays the best."""
    argv = [*TRAIN, *"--steps 4 --save-every 1 --keep 1 --lr 0.3 --eval-text text.txt --out heldout".split()]
    out = run(capsys, *argv)
    seen = {m["step"]: m["held_out_loss"] for m in read_metrics("heldout/metrics.jsonl") if "held_out_loss" in m}
    assert list(seen) == [1, 2, 3, 4] and len(set(seen.values())) == 4
    assert out["best_step"] == min(seen, key=seen.get) < 4 and out["best_held_out_loss"] == min(seen.values())
    kept = sorted(int(p.name) for p in (here / "heldout/checkpoints").iterdir())
    assert kept == [out["best_step"], 4]
    last = run(capsys, *"eval heldout --text text.txt --convention gptq-16".split())
    assert last["nats_per_token"] == pytest.approx(seen[4], rel=1e-5)  # of the packed weights


@pytest.mark.slow
def test_parameters_that_the_mesh_could_not_split_are_reported(here, capsys, monkeypatch):
    from lowbit.train import loop

    whole = ("model.embed_tokens: 258 does not divide over 4 tensor devices",)
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: dataclasses.replace(real(*a, **k), whole=whole))
    assert run(capsys, *TRAIN, "--steps", "1", "--out", "unsplit")["not_split"] == list(whole)
    assert json.loads((here / "unsplit/summary.json").read_text())["not_split"] == list(whole)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(here, capsys):
    """The real program: stopped after its first metrics, it exits with 0, and --resume gives what no stop gives."""
    argv = [*TRAIN, *"--steps 400 --schedule constant --out".split()]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", *argv, "killed"], cwd=here, stderr=subprocess.PIPE, text=True
    )
    try:
        waited = time.monotonic() + 300
        while not read_metrics(here / "killed/metrics.jsonl"):
            assert process.poll() is None and time.monotonic() < waited
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 0, err
    summary = json.loads((here / "killed/summary.json").read_text())
    stopped = summary["step"]
    assert summary["status"] == "stopped" and 0 < stopped < 400
    assert [p.name for p in (here / "killed/checkpoints").iterdir()] == [str(stopped)]
    assert main("eval killed --text text.txt".split()) == 2
    assert "no finished model" in capsys.readouterr().err
    argv[argv.index("400")] = str(stopped + 3)
    whole, killed = run(capsys, *argv, "unkilled"), run(capsys, *argv, "killed", "--resume")
    assert killed["status"] == "finished" and killed["step"] == stopped + 3 and killed["loss"] == whole["loss"]
    weights = [(here / d / "model/model.safetensors").read_bytes() for d in ("unkilled", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_train_without_quantization(here, capsys):
    argv = [*TRAIN, "--steps", "1", "--loss", "ce", "--out", "fp"]
    argv[argv.index("int4:g8")] = "bf16"
    assert run(capsys, *argv)["bits_per_weight_quantized"] is None


EXPERIMENT = '''"""Small.

Purpose: shows how a run is made.
Command: lowbit run x.py
Device: CPU
Expected time: 1 s
Expected numbers: loss 0.5
"""
import dataclasses

@dataclasses.dataclass(frozen=True)
class Opt:
    lr: float = 1e-4

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 2
    opt: Opt = Opt()

def run(config, run):
    print("chatter")
    for step in range(config.steps):
        run.log(step, loss=config.opt.lr)
    run.summary(loss=config.opt.lr)

def dry_run(config):
    return {"tokens": 10 * config.steps, "tensors": [{"path": "a", "shape": [2], "format": "bf16", "bytes": 4}]}
'''


def test_run_an_experiment(here, capsys):
    (here / "x.py").write_text(EXPERIMENT)
    out = run(capsys, *"run x.py --opt.lr=0.5 --steps 3 --out runs/a".split())
    assert out["loss"] == 0.5 and out["run"] == "runs/a"
    assert len(read_metrics("runs/a/metrics.jsonl")) == 3
    assert json.loads((here / "runs/a/config.json").read_text()) == {"steps": 3, "opt": {"lr": 0.5}}
    assert main("run --resume x.py --opt.lr 0.5 --steps 3 --out=runs/a".split()) == 0
    capsys.readouterr()
    assert main("run x.py --opt.lr 0.25 --steps 3 --out runs/a --resume".split()) == 2
    assert "opt.lr: 0.5 -> 0.25" in capsys.readouterr().err
    default = run(capsys, "run", "x.py")
    assert default["run"].startswith("runs/x-")


def test_dry_run_and_help_of_an_experiment(here, capsys):
    (here / "x.py").write_text(EXPERIMENT)
    out = run(capsys, *"run x.py --dry-run --steps 7 --out runs/dry".split())
    assert out["plan"]["tokens"] == 70 and out["config"]["steps"] == 7 and not (here / "runs/dry").exists()
    assert main("run x.py --dry-run".split()) == 0
    text = capsys.readouterr().out
    assert "Expected numbers: loss 0.5" in text and "tokens  20" in text and "chatter" not in text
    assert main("run x.py --help".split()) == 0
    text = capsys.readouterr().out
    assert "--opt.lr" in text and "--resume" in text and "shows how a run is made" in text


# -- progress, flags --------------------------------------------------------------------------------------------------


def test_progress_lines(capsys):
    with Progress("train", 10, every=4) as progress:
        for step in range(1, 11):
            progress.update(step, loss=0.12345)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["train 4/10", "loss 0.1235"], ["train 8/10", "loss 0.1235"], ["train 10/10", "loss 0.1235"],
    ]  # fmt: skip


def test_progress_bar_on_a_terminal(capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with Progress("train", 10, stream=(stream := Terminal())) as progress:
        progress.resume(4)
        progress.update(10, loss=0.5)
    assert "10/10" in stream.getvalue() and "loss 0.5" in stream.getvalue()
    assert capsys.readouterr() == ("", "")


def test_xla_flags():
    assert xla.flags("", "0.10.2") == f"{xla.FLAG}=-reduce"
    assert xla.flags("--a=1", "0.11.2") == f"--a=1 {xla.FLAG}=-reduce"
    assert xla.flags(f"{xla.FLAG}=reduce", "0.10.2") == f"{xla.FLAG}=reduce"
    assert xla.flags("--a=1", "0.12.0") == "--a=1"


def test_int8_reductions_are_right():
    """The miscompile that the flag avoids; in a process of its own, where lowbit is imported first."""
    code = (
        "import lowbit, jax, jax.numpy as jnp, numpy as np\n"
        "r = np.random.default_rng(0)\n"
        "a, b = (r.integers(0, 16, (64, 2, 64)).astype(np.uint8) for _ in range(2))\n"
        "x = r.standard_normal((2, 64)).astype(np.float32)\n"
        "f = lambda q: (q.astype(jnp.int8) - 8).astype(jnp.float32)\n"
        "y = jax.jit(lambda x, a, b: (x * f(a) + x * f(b)).sum((-1, -2)))(x, a, b)\n"
        "want = (x * (a.astype(np.float64) - 8) + x * (b.astype(np.float64) - 8)).sum((-1, -2))\n"
        "assert abs(np.asarray(y) - want).max() < 1e-2, abs(np.asarray(y) - want).max()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

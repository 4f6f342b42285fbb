"""The main job, small: a byte-level Llama trained here instead of the base model, few steps, little text."""

import json

import pytest

from lowbit.cli import main

SMALL = [
    "--pretrain",
    "--pretrain-steps=4",
    "--opt.steps=2",
    "--opt.batch-size=2",
    "--opt.seq=128",
    "--opt.warmup=0",
    "--data.eval-tokens=600",
    "--formats=tq2_0",
]
FILE = "experiments/quickstart.py"


def prose(tmp_path):
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew potent jam".split()
    documents = [" ".join(words[(i * k + k * k) % len(words)] for k in range(160)) + f" {i}." for i in range(3, 60)]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


@pytest.mark.slow
def test_quickstart_measures_exports_reports_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    args = ["run", FILE, *SMALL, f"--data.path={prose(tmp_path)}", f"--out={out}"]
    assert main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in data["rows"]]
    assert names == [
        "fp",
        "fp in bfloat16 (noise floor)",
        "fp, trained equally long",
        "RTN tq2_0",
        "QAT tq2_0",
    ]
    rows = dict(zip(names, data["rows"]))
    assert rows["QAT tq2_0"]["types"]["TQ2_0"] == 14 and rows["QAT tq2_0"]["bits_per_weight_quantized"] == 2.0625
    assert rows["fp"]["kl_mean"] == 0 and all(r["kl_export"] <= 1e-4 for r in data["rows"] if "kl_export" in r)
    for name in ("report.md", "report.html", "report.png", "results.json"):
        assert (out / "report" / name).stat().st_size > 0

    (out / "measured" / "qat-tq2_0.json").unlink()  # as if interrupted before the last row was measured
    assert main([*args, "--resume", "--json"]) == 0
    again = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert again["QAT tq2_0"]["kl_mean"] == rows["QAT tq2_0"]["kl_mean"]
    assert again["RTN tq2_0"] == rows["RTN tq2_0"]


def test_dry_run_lists_every_tensor_of_every_format_and_writes_nothing(tmp_path, capsys):
    assert main(["run", FILE, "--pretrain", "--formats=q4_0", f"--out={tmp_path / 'r'}", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]["q4_0"]
    assert plan["per_device"]["params"] > 0
    assert {row["format"] for row in plan["tensors"]} == {"q4_0", "bf16"}
    assert not (tmp_path / "r").exists()


def test_two_sources_of_text_are_refused(capsys, tmp_path):
    args = ["run", FILE, "--pretrain", "--data.path=a.txt", "--data.hub=b", f"--out={tmp_path / 'r'}"]
    assert main(args) == 2
    assert "--data.path a.txt and --data.hub b" in capsys.readouterr().err

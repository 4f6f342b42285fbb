"""experiments/vq.py: rows of solvers and recipes, and more rows for a table that is there."""

import json

import jax
import pytest

from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model

CONFIG = ModelConfig("llama", 258, 32, 96, 1, 2, 1, 16, 64, tied=True)
SMALL = ["--seq=16", "--steps=3", "--revise-every=2", "--calibration-rows=4", "--blocks.rows=4"]
SMALL += ["--blocks.valid-rows=2", "--data.eval-tokens=64", "--data.held-out=0.5"]


@pytest.mark.slow
def test_rows_are_added_to_a_table_and_those_that_were_measured_stay(tmp_path, capsys):
    save_hf(Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ByteTokenizer()), tmp_path / "m", dtype="float32")
    documents = [f"The {word} jumps over a lazy dog, again and again, {i} times." for i in range(20) for word in "abc"]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
    args = ["run", "experiments/vq.py", f"--model={tmp_path / 'm'}", f"--data.path={tmp_path / 'text.txt'}", *SMALL]
    args += [f"--out={tmp_path / 'run'}", "--json", "--rows", "rtn int2:g16:mse", "gptq int2:g16"]
    assert main(args) == 0
    first = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(first) == ["fp", "rtn int2:g16:mse", "gptq int2:g16"]
    assert main([*args, "gptq int2:g16 pv", "--resume"]) == 0
    out = capsys.readouterr()
    again = {row["name"]: row for row in json.loads(out.out)["rows"]}
    assert list(again) == [*first, "gptq int2:g16 pv"]
    assert all(again[name] == first[name] for name in list(first)[1:])
    lines = (tmp_path / "run/gptq-int2-g16-pv/metrics.jsonl").read_text().splitlines()
    told = [m for m in map(json.loads, lines) if "codes_changed" in m]
    assert [m["step"] for m in told] == [2] and told[0]["loss_after"] <= told[0]["loss_before"]
    assert main([*args, "gptq int2:g16 pv", "--revise-every=3", f"--out={tmp_path / 'no'}"]) == 2
    assert "revise_every is 3 with 3 steps" in capsys.readouterr().err
    assert main([*args, "--steps=4", "--resume"]) == 2
    assert "steps: 3 -> 4" in capsys.readouterr().err

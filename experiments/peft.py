"""Adapters over packed weights: where they start, what training wins, and what they take, at 4 and at 2 bits.

Paper: QLoRA (arXiv 2305.14314), LoftQ (2310.08659), QA-LoRA (2309.14717). Every row trains on the same rows of text, by
    forward KL to the full-precision model; only the adapters learn. `start` is the KL before training, which is that of
    rounding to nearest for QLoRA and QA-LoRA; bits count the adapters, in float32, where they stay beside the weights.
    QA-LoRA's are merged into the minima: its formats are those of GGUF's Q4_1 and the same at 2 bits.
Command: lowbit run experiments/peft.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 3 CPU minutes (7 minutes on 2 cores under a load of 8)
Expected numbers: KL of nf4:dq 0.092 rounded, 0.038 QLoRA, 0.031 LoftQ; of q4_1 0.059 and 0.041 QA-LoRA (docs/peft.md)
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import qat
from lowbit.evaluate.perplexity import evaluate
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, kept, open_ground, rest_bf16, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data
from lowbit.models.hf import load_hf, save_hf
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.qat import adapters
from lowbit.train.config import TrainConfig

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"
ROWS = (
    "rtn bf16",
    "rtn nf4:dq",
    "qlora:r8 nf4:dq",
    "loftq:r8 nf4:dq",
    "rtn q4_1",
    "qa-lora:r2 q4_1",
    "rtn nf2:dq",
    "qlora:r8 nf2:dq",
    "loftq:r8 nf2:dq",
    "rtn int2:g32:min",
    "qa-lora:r2 int2:g32:min",
)


@dataclasses.dataclass(frozen=True)
class Opt:
    """AdamW with a cosine schedule, the same for every trained row."""

    lr: float = 1e-2
    steps: int = 48
    batch_size: int = 4
    """Rows of one step."""
    seq: int = 256
    """Tokens of one row."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = str(SHARED / "models/stories260K/stories260K.bin")
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Recipe (or rtn) and format of the linears inside blocks."""
    keep: tuple[str, ...] = (r".*\.mlp\.down_proj",)
    """Regular expressions of weights that stay bf16."""
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt", eval_tokens=8192)
    opt: Opt = Opt()


def run(config: Config, run: Run) -> None:
    g = open_ground(config.model, config.data, config.opt.seq, run)
    table = [
        kept(run.path("measured", f"{slug(name)}.json"), partial(measure, config, run, g, name)) for name in config.rows
    ]
    notes = (
        f"{g.held_out} held-out documents, {config.data.eval_tokens} tokens of them at most; each trained row saw "
        f"{config.opt.steps * config.opt.batch_size * config.opt.seq} tokens; `{'`, `'.join(config.keep)}` stays bf16."
    )
    paths = report.write_report(table, run.path("report"), "Adapters over packed weights", notes)
    run.summary(rows=table, report=str(paths["report.html"]))
    print(report.text_table(table), flush=True)


def measure(config: Config, run: Run, g: Ground, name: str) -> dict[str, Any]:
    """One row, evaluated from the packed folder that it was saved to."""
    fp, text, o = g.fp, g.text, config.opt
    recipe_name, fmt = name.split()
    assignment = Plan(tuple(Rule(k, "bf16") for k in config.keep), fmt).resolve(fp.config.shapes())
    begin, start, trained = time.monotonic(), None, 0
    if recipe_name == "rtn":
        params = rtn.quantize(fp.params, assignment)
    else:
        recipe = qat.get(recipe_name)
        params = recipe.prepare(fp.params, assignment)
        trained = adapters.parameters(params)
        start = evaluate(fp.replace(params=params), text, fp)["kl_mean"]
        own = {
            "steps": o.steps,
            "batch_size": o.batch_size,
            "lr": o.lr,
            "seed": o.seed,
            "save_every": max(1, o.steps // 4),
        }
        settings = TrainConfig(**own, warmup=2, loss="kl", log_every=8, keep=1)
        params = recipe.convert(fit(run, f"train {name}", params, settings, fp, g.packed))
    seconds = time.monotonic() - begin
    folder = run.path("models", slug(name))
    save_hf(fp.replace(params=rest_bf16(params)), folder, dtype=None, packed=True)
    scores = evaluate(load_hf(folder), text, fp)
    print(f"{name}: KL {scores['kl_mean']:.4g}, {seconds:.0f} s", flush=True)
    row = {"name": name, "kl_start": start, "kl_mean": scores["kl_mean"]}
    row |= {k: scores[k] for k in ("same_top1", "perplexity", "bits_per_weight_quantized")}
    return row | {"trained": trained, "seconds": round(seconds, 1)}

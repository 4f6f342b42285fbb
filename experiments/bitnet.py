"""BitNet b1.58 from scratch at two sizes, beside the same model in full precision; and from a pretrained one.

Paper: BitNet b1.58 (arXiv 2402.17764): trained from scratch on the same tokens, the gap to full precision shrinks with
    size. Both sizes see the same rows in the same order; ternary weights with one scale a matrix, int8 inputs, SubLN
    before the last linear of each half block, squared ReLU, two-stage learning rate and weight decay; full precision is
    the Llama of the same widths. Then b1.58 on a pretrained model (KL to it), at once and with quantization warmed up.
Command: lowbit run experiments/bitnet.py
Device: 2 CPU cores; tokenizer, model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 20 minutes on 2 CPU cores
Expected numbers: gap of b1.58 0.77 nats per token at width 64, 0.23 at 256
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lowbit import qat
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, kept, open_ground, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.plan import Plan
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = str(SHARED / "models/stories260K/stories260K.bin")
    """The pretrained model, whose tokenizer all take: folder, file, run directory, hub id or name in the package."""
    widths: tuple[int, ...] = (64, 256)
    """Hidden sizes of the models trained from scratch."""
    layers: int = 4
    steps: int = 192
    batch_size: int = 16
    """Rows of one step, from scratch."""
    seq: int = 256
    """Tokens of one row."""
    optimizer: str = "muon"
    """Of the models from scratch: on so few tokens far ahead of AdamW."""
    lr: tuple[float, ...] = (2e-2, 2e-2)
    """Peak learning rate of full precision, for each width."""
    lr_ternary: tuple[float, ...] = (2e-2, 2e-2)
    """The same of b1.58."""
    weight_decay: float = 0.1
    tune_steps: int = 48
    tune_batch: int = 8
    """Rows of one step, from the pretrained model."""
    tune_lr: float = 3e-3
    warmups: tuple[int, ...] = (0, 12, 24)
    """Steps of quantization warm-up of the pretrained rows."""
    seeds: tuple[int, ...] = (0,)
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt", eval_tokens=16384)


def run(config: Config, run: Run) -> None:
    g = open_ground(config.model, config.data, config.seq, run)
    table: list[dict[str, Any]] = []

    def measure(name: str, make: Callable[[], tuple[ModelConfig, Tree]], compare: bool = False, **kind: Any) -> None:
        def found() -> dict[str, Any]:
            start = time.monotonic()
            model, params = make()
            done = g.fp.replace(config=model, params=params)
            scores = evaluate(done, g.text, g.fp if compare else None, config.data.convention)
            row = {"name": name, **kind, "loss": math.log(scores["perplexity"]), **scores, **sizes(params)}
            print(f"{name}: perplexity {scores['perplexity']:.3f}", file=sys.stderr, flush=True)
            return row | {"seconds": round(time.monotonic() - start, 1)}

        table.append(kept(run.path("measured", f"{slug(name)}.json"), found))

    for width, lr, low in zip(config.widths, config.lr, config.lr_ternary, strict=True):
        for seed in config.seeds:
            fp = partial(scratch, config, run, g, width, lr, False, seed)
            measure(f"fp {width} seed {seed}", fp, method="fp", width=width)
            ternary = partial(scratch, config, run, g, width, low, True, seed)
            measure(f"b1.58 {width} seed {seed}", ternary, method="bitnet", width=width)
    for steps in config.warmups:
        for seed in config.seeds:
            name = f"pretrained, warm-up {steps} seed {seed}"
            measure(name, partial(tuned, config, run, g, steps, seed), True, method="bitnet tuned")

    gaps = {w: mean(table, "bitnet", w) - mean(table, "fp", w) for w in config.widths}
    tokens = config.steps * config.batch_size * config.seq
    words = f"{tokens} tokens from scratch, {config.tune_steps * config.tune_batch * config.seq} from the pretrained"
    words += f" model; {table[0]['tokens']} held-out tokens. Gap of b1.58 to full precision, nats per token: "
    words += ", ".join(f"{gap:.4f} at width {width}" for width, gap in gaps.items()) + "."
    names = ("name", "method", "loss", "perplexity", "kl_mean", "params", "bits_per_weight", "seconds")
    shown = [{k: row[k] for k in names if k in row} for row in table]
    paths = report.write_report(shown, run.path("report"), "BitNet b1.58", words)
    run.summary(rows=table, gaps=gaps, report=str(paths["report.html"]), tokens_trained=tokens)
    print(f"{report.text_table(shown)}\n{words}", flush=True)


def architecture(config: Config, g: Ground, width: int, ternary: bool) -> ModelConfig:
    """The Llama of a width, and b1.58's changes to it."""
    like = g.fp.config
    return dataclasses.replace(
        like,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_layers=config.layers,
        num_heads=max(1, width // 32),
        num_kv_heads=max(1, width // 32),
        head_dim=min(width, 32),
        max_position=config.seq,
        sub_norm="sub" if ternary else "none",
        activation="relu2" if ternary else "silu",
    )


def scratch(
    config: Config, run: Run, g: Ground, width: int, lr: float, ternary: bool, seed: int
) -> tuple[ModelConfig, Tree]:
    """A model of one width after training on cross-entropy; packed if it is ternary."""
    model = architecture(config, g, width, ternary)
    recipe = qat.get("bitnet" if ternary else "ste")
    assignment = Plan((), "ternary:tensor").resolve(model.shapes()) if ternary else {}
    own = {"steps": config.steps, "batch_size": config.batch_size, "lr": lr, "warmup": config.steps // 16, "seed": seed}
    own |= {
        "optimizer": config.optimizer,
        "loss": "ce",
        "log_every": 16,
        "save_every": max(1, config.steps // 4),
        "keep": 1,
    }
    settings = TrainConfig(**{"weight_decay": config.weight_decay} | recipe.defaults | own)
    params = recipe.prepare(init_params(model, jax.random.key(seed)), assignment)
    name = f"{'b1.58' if ternary else 'fp'} {width} {seed}"
    return model, recipe.convert(fit(run, name, params, settings, g.fp.replace(config=model), g.packed))


def tuned(config: Config, run: Run, g: Ground, warmup: int, seed: int) -> tuple[ModelConfig, Tree]:
    """The pretrained model in b1.58 after training on the KL to itself; packed."""
    recipe = qat.get("bitnet")
    assignment = Plan((), "ternary:tensor").resolve(g.fp.config.shapes())
    own = {"steps": config.tune_steps, "batch_size": config.tune_batch, "lr": config.tune_lr, "warmup": 2, "seed": seed}
    settings = TrainConfig(**recipe.defaults | own | {"loss": "kl", "quant_warmup": warmup, "log_every": 16, "keep": 1})
    start = recipe.prepare(g.fp.params, assignment)
    return g.fp.config, recipe.convert(fit(run, f"tuned {warmup} {seed}", start, settings, g.fp, g.packed))


def mean(table: list[dict[str, Any]], method: str, width: int) -> float:
    found = [row["loss"] for row in table if row["method"] == method and row["width"] == width]
    return sum(found) / len(found)

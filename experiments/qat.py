"""Every recipe at every bit width, on the same model, text and number of tokens.

Purpose: docs/qat.md's table. A row is a recipe and a format of the linears inside blocks; each is run with several
    seeds, which order the training rows. Recipes minimise forward KL to the frozen model; `rtn`, `gptq` do not train.
    Block-AP, E2E-QP and both see as many tokens as the others. Learning rates are those of a model of 260 thousand
    parameters: one for 3 bits and below, one for 4; published recipes keep everything else that they say.
Command: lowbit run experiments/qat.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 15 minutes a seed on 2 free CPU cores, 36 beside other work
Expected numbers: learned scales ahead of fitted ones at 3 bits and below; docs/qat.md has all
"""

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import qat
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, ground, kept, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data
from lowbit.export.open import open_model
from lowbit.formats import base
from lowbit.formats.base import Format
from lowbit.plan import Plan, Rule
from lowbit.ptq import base as solvers
from lowbit.ptq import calibrate, rtn
from lowbit.ptq.calibrate import tokenize
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"
# Rows of this model's linears have 64 weights: a scale for a row is one for a group of 64.
GRID = {
    "rtn": "int4:g64 int3:g64 int2:g64 ternary:g64 int1:g64",
    "gptq": "int4:g64:mse int3:g64:mse int2:g64:mse ternary:g64 int1:g64",
    "ste": "int4:g64 int3:g64 int2:g64 ternary:g64 int1:g64",
    "ste-learned": "int4:g64:signmse:lsq int3:g64:signmse:lsq int2:g64:signmse:lsq int2:g64:midrise:mse:paretoq"
    " ternary:g64:lsq int1:g64",
    "lsq": "int4:g64 int3:g64 int2:g64 ternary:g64",
    "lsq+": "int4:g64 int3:g64 int2:g64 ternary:g64",
    "paretoq": "int4:g64 int3:g64 int2:g64:midrise ternary:g64 int1:g64",
    "dorefa": "dorefa4:g64 dorefa3:g64 dorefa2:g64 int1:g64",
    "bitnet": "ternary:tensor int1:tensor:centered",
    "bitnet-v2": "ternary:tensor",
    "llm-qat": "int4:g64 int3:g64",
    "block-ap": "int4:g64:asym:rounded int3:g64:asym:rounded int2:g64:asym:rounded",
    "e2e-qp": "int4:g64:asym:rounded int3:g64:asym:rounded int2:g64:asym:rounded",
    "efficientqat": "int4:g64:asym:rounded int3:g64:asym:rounded int2:g64:asym:rounded",
    "parq": "int4:g64 int3:g64 int2:g64 ternary:g64 int1:g64",
    "binary-relax": "int4:g64 int3:g64 int2:g64 ternary:g64 int1:g64",
}
ROWS = tuple(f"{recipe} {fmt}" for recipe, formats in GRID.items() for fmt in formats.split())
SOLVERS = ("rtn", "gptq")


@dataclasses.dataclass(frozen=True)
class Opt:
    """AdamW with a cosine schedule, unless the recipe says otherwise."""

    lr: float = 3e-3
    """Peak learning rate at 3 bits and below."""
    lr_high: float = 3e-4
    """Peak learning rate above 3 bits."""
    scale_lr: float = 1.0
    """Learning rate of learned scales, times that of the weights."""
    steps: int = 48
    batch_size: int = 8
    """Rows of one step."""
    seq: int = 256
    """Tokens of one row."""
    warmup: int = 2
    block_lr: float = 2e-3
    """Peak learning rate of weights in Block-AP; scales and zero points: 1.5 times as much."""
    e2e_lr: float = 1e-2
    """Peak learning rate of E2E-QP's scales at 2 bits on rounded codes; a tenth on those of Block-AP."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = str(SHARED / "models/stories260K/stories260K.bin")
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Each "RECIPE FORMAT" or "SOLVER FORMAT", and the activation format of its linears if it is not `act`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    keep: tuple[str, ...] = (r".*\.mlp\.down_proj",)
    """Regular expressions of weights that stay as they are (rows of 172 have no group of 64)."""
    act: str = ""
    """Activation format of every linear inside blocks; none: what the recipe adds."""
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt", eval_tokens=8192)
    opt: Opt = Opt()


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    cases = {row: parse(config, row) for row in config.rows}
    for _, fmt, act in cases.values():
        make_plan(config, fmt, act).resolve(model.config.shapes())  # refuses before hours of work
    g = ground(model, config.model, config.data, config.opt.seq, run)
    table = [{"name": "fp", "method": "fp", "bits": 16.0, **evaluate(g.fp, g.text, g.fp, config.data.convention)}]
    for name, case in cases.items():
        seeds = (0,) if case[0] in SOLVERS else config.seeds
        one = partial(measure, config, run, g, *case)
        table.append(
            summarize([kept(run.path("measured", slug(f"{name} {n}") + ".json"), partial(one, n)) for n in seeds])
        )
        row = table[-1]
        print(f"{row['name']}: KL {row['kl_mean']:.4g} +- {row['kl_sd']:.2g}", file=sys.stderr, flush=True)
    hidden = ("types", "convention", "tokens", "windows", "perplexity_stderr", "kl_mean_stderr")
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in table]
    o = config.opt
    tokens = o.steps * o.batch_size * o.seq
    words = (
        f"{table[0]['tokens']} held-out tokens; {tokens} tokens a trained row; {len(config.seeds)} seeds, `kl_sd` is"
    )
    words += f" their standard deviation. `{'`, `'.join(config.keep)}` stays as it is."
    paths = report.write_report(shown, run.path("report"), f"Recipes: {Path(config.model).name}", words)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(report.text_table(shown), flush=True)


def parse(config: Config, row: str) -> tuple[str, str, str]:
    """The recipe (or solver), the format and the activation format ("": none) of a row. Raises `InputError`."""
    words = row.split()
    if len(words) not in (2, 3):
        raise InputError(f"row {row!r} (allowed: RECIPE FORMAT [INPUT FORMAT], such as 'lsq int4:g64 int4:lsq')")
    if words[0] not in SOLVERS:
        qat.get(words[0])
    return words[0], base.get(words[1]).name, words[2] if len(words) == 3 else config.act


def make_plan(config: Config, fmt: str, act: str) -> Plan:
    rules = [Rule(k, "bf16") for k in config.keep]
    rules += [Rule(r"model\.layers\..*:in", act)] if act else []
    return Plan(tuple(rules), fmt)


def measure(config: Config, run: Run, g: Ground, recipe: str, fmt: str, act: str, seed: int) -> dict[str, Any]:
    """One run: makes the model, packs it and evaluates what was packed."""
    name, start = f"{recipe} {fmt} {act}".strip(), time.monotonic()
    assignment = make_plan(config, fmt, act).resolve(g.fp.config.shapes())
    if recipe in SOLVERS:
        options = {"rows": 64, "length": config.opt.seq} if recipe == "gptq" else {}
        params = solvers.get(recipe).quantize(g.fp, assignment, g.documents, **options)
    else:
        params = learned(config, run, g, recipe, fmt, assignment, seed)
    seconds = time.monotonic() - start
    scores = evaluate(g.fp.replace(params=params), g.text, g.fp, config.data.convention)
    row = {"name": name, "method": recipe, "format": fmt, "bits": bits_of(base.get(fmt))}
    row |= scores | {"file_bytes": sizes(params)["stored_bytes"], "seconds": round(seconds, 1)}
    print(f"{name} seed {seed}: KL {scores['kl_mean']:.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return row


def learned(config: Config, run: Run, g: Ground, name: str, fmt: str, assignment: Mapping[str, Any], seed: int) -> Tree:
    """The packed parameters after the recipe, with the tokens of `config.opt` over all of its phases."""
    fp, o, recipe = g.fp, config.opt, qat.get(name)
    stored = rtn.ranges(fp.config, calibrate.readers_of(fp.params), fp.tokenizer, assignment, g.documents)
    params, steps = fp.params, o.steps
    if recipe.before is not None:
        share = 1 if recipe.before.alone else 2
        epochs, valid = 2, 16
        count = o.steps * o.batch_size // (epochs * share) // 2 * 2
        options = BlockOptions(count, valid, epochs=epochs, weight_lr=o.block_lr, quant_lr=1.5 * o.block_lr, seed=seed)
        tokens = tokenize(g.documents, fp.tokenizer, count + valid, o.seq, seed)
        params, steps = recipe.before.run(fp, assignment, tokens, options, stored=stored), o.steps // share
        if recipe.before.alone:
            return params
    lr = o.lr if bits_of(base.get(fmt)) <= 3 else o.lr_high
    if name in ("e2e-qp", "efficientqat"):  # scales of N bits are about 3 / (2^N - 1) as large, and so is their rate
        low, high = base.get(fmt).levels
        lr = o.e2e_lr * (0.1 if recipe.before is not None else 1.0) * 3 / (high - low)
    own = {"steps": steps, "batch_size": o.batch_size, "lr": lr, "warmup": o.warmup, "seed": seed, "loss": "kl"}
    settings = TrainConfig(**{"scale_lr": o.scale_lr} | recipe.defaults | own | {"log_every": o.steps, "keep": 1})
    start = recipe.prepare(params, assignment, stored=stored)
    inputs = sorted({f.name for site, f in assignment.items() if site.endswith(":in")})
    title = " ".join([name, fmt, *inputs, str(seed)])
    return recipe.convert(fit(run, title, start, settings, fp, g.packed, recipe))


def bits_of(fmt: Format) -> float:
    """What a format is called: log2 of its levels, without scales."""
    low, high = fmt.levels
    return round(math.log2((high - low) // (2 if getattr(fmt, "odd", False) else 1) + 1), 2)


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over seeds of one row, and the standard deviation of its KL."""
    kl = [row["kl_mean"] for row in found]
    means = {k: statistics.fmean(r[k] for r in found) for k in ("kl_mean", "perplexity", "same_top1", "seconds")}
    return found[0] | means | {"kl_sd": statistics.stdev(kl) if len(kl) > 1 else 0.0}

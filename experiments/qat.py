"""Every recipe at every bit width, on the same model, text and number of tokens.

Purpose: docs/qat.md's table. A row is a recipe and a format of the linears inside blocks; each is run with several
    seeds, which order the training rows. Recipes minimise forward KL to the frozen model; `rtn`, `gptq` do not train.
    Block-AP, E2E-QP and both see as many tokens as the others. Learning rates are those of a model of 260 thousand
    parameters: one for 3 bits and below, one for 4; published recipes keep everything else that they say.
Command: lowbit run experiments/qat.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 36 minutes for 50 rows and one seed, beside other work
Expected numbers: learned scales ahead of fitted ones at 3 bits and below; docs/qat.md has all
"""

import dataclasses
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import qat
from lowbit.data import rows as data_rows
from lowbit.errors import InputError, Stopped
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.run import Run, write_json
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.open import open_model
from lowbit.formats import base
from lowbit.formats.base import Format
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import base as solvers
from lowbit.ptq import calibrate, rtn
from lowbit.ptq.calibrate import tokenize
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
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
    """Each "RECIPE FORMAT" or "SOLVER FORMAT"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    keep: tuple[str, ...] = (r".*\.mlp\.down_proj",)
    """Regular expressions of weights that stay as they are (rows of 172 have no group of 64)."""
    act: str = ""
    """Activation format of every linear inside blocks; none: what the recipe adds."""
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt", eval_tokens=8192)
    opt: Opt = Opt()


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all rows share."""

    fp: Model
    documents: list[str]
    packed: data_rows.Rows
    text: list[str]


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    if model.tokenizer is None:
        raise InputError(f"model {config.model} has no tokenizer (allowed: a model with one)")
    cases = [parse(row) for row in config.rows]
    fp = model.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params))
    for _, fmt in cases:
        make_plan(config, fmt).resolve(fp.config.shapes())  # refuses before hours of work
    documents, held_out, _ = split(config.data, model, read_documents(config.data))
    packed = data_rows.prepare(documents, model.tokenizer, config.opt.seq, run.path("rows"))
    ground = Ground(fp, documents, packed, first_tokens(model, held_out, config.data.eval_tokens))
    table = [{"name": "fp", "method": "fp", "bits": 16.0, **evaluate(fp, ground.text, fp, config.data.convention)}]
    for recipe, fmt in cases:
        found = []
        for seed in (0,) if recipe in SOLVERS else config.seeds:
            saved = run.path("measured", slug(f"{recipe} {fmt} {seed}") + ".json")
            if not saved.exists():
                write_json(saved, measure(config, ground, recipe, fmt, seed))
            found.append(json.loads(saved.read_text()))
        table.append(summarize(found))
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


def parse(row: str) -> tuple[str, str]:
    """The recipe (or solver) and the format of a row, both known. Raises `InputError`."""
    words = row.split()
    if len(words) != 2:
        raise InputError(f"row {row!r} (allowed: RECIPE FORMAT, such as 'lsq int4:g64')")
    if words[0] not in SOLVERS:
        qat.get(words[0])
    return words[0], base.get(words[1]).name


def make_plan(config: Config, fmt: str) -> Plan:
    rules = [Rule(k, "bf16") for k in config.keep]
    rules += [Rule(r"model\.layers\..*:in", config.act)] if config.act else []
    return Plan(tuple(rules), fmt)


def measure(config: Config, ground: Ground, recipe: str, fmt: str, seed: int) -> dict[str, Any]:
    """One run: makes the model, packs it and evaluates what was packed."""
    fp, start = ground.fp, time.monotonic()
    assignment = make_plan(config, fmt).resolve(fp.config.shapes())
    if recipe in SOLVERS:
        options = {"rows": 64, "length": config.opt.seq} if recipe == "gptq" else {}
        params = solvers.get(recipe).quantize(fp, assignment, ground.documents, **options)
    else:
        params = learned(config, ground, recipe, fmt, assignment, seed)
    seconds = time.monotonic() - start
    done = fp.replace(params=params)
    scores = evaluate(done, ground.text, fp, config.data.convention)
    row = {"name": f"{recipe} {fmt}", "method": recipe, "format": fmt, "bits": bits_of(base.get(fmt))}
    row |= scores | {"file_bytes": sizes(params)["stored_bytes"], "seconds": round(seconds, 1)}
    print(f"{recipe} {fmt} seed {seed}: KL {scores['kl_mean']:.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return row


def learned(config: Config, ground: Ground, name: str, fmt: str, assignment: Mapping[str, Any], seed: int) -> Tree:
    """The packed parameters after the recipe, with the tokens of `config.opt` over all of its phases."""
    fp, o, recipe = ground.fp, config.opt, qat.get(name)
    stored = rtn.ranges(fp.config, calibrate.readers_of(fp.params), fp.tokenizer, assignment, ground.documents)
    params, steps = fp.params, o.steps
    if recipe.before is not None:
        share = 1 if recipe.before.alone else 2
        epochs, valid = 2, 16
        count = o.steps * o.batch_size // (epochs * share) // 2 * 2
        options = BlockOptions(count, valid, epochs=epochs, weight_lr=o.block_lr, quant_lr=1.5 * o.block_lr, seed=seed)
        tokens = tokenize(ground.documents, fp.tokenizer, count + valid, o.seq, seed)
        params, steps = recipe.before.run(fp, assignment, tokens, options, stored=stored), o.steps // share
        if recipe.before.alone:
            return params
    lr = o.lr if bits_of(base.get(fmt)) <= 3 else o.lr_high
    if name in ("e2e-qp", "efficientqat"):  # scales of N bits are about 3 / (2^N - 1) as large, and so is their rate
        low, high = base.get(fmt).levels
        lr = o.e2e_lr * (0.1 if recipe.before is not None else 1.0) * 3 / (high - low)
    own = {"steps": steps, "batch_size": o.batch_size, "lr": lr, "warmup": o.warmup, "seed": seed, "log_every": 8}
    settings = TrainConfig(**{"scale_lr": o.scale_lr, "loss": "kl"} | recipe.defaults | {"loss": "kl"} | own)
    done = train(
        recipe.prepare(params, assignment, stored=stored),
        lambda step: ground.packed.batch(step, settings.batch_size, seed),
        language(fp.config, settings, fp.config),
        settings,
        teacher=fp.params,
        wrap=recipe.wrap,
    )
    if done.status == "stopped":
        raise Stopped("stopped within a row: the same command with --resume starts that row again")
    return recipe.convert(done.params)


def bits_of(fmt: Format) -> float:
    """What a format is called: log2 of its levels, without scales."""
    low, high = fmt.levels
    return round(math.log2((high - low) // (2 if getattr(fmt, "odd", False) else 1) + 1), 2)


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over seeds of one row, and the standard deviation of its KL."""
    kl = [row["kl_mean"] for row in found]
    means = {k: statistics.fmean(r[k] for r in found) for k in ("kl_mean", "perplexity", "same_top1", "seconds")}
    return found[0] | means | {"kl_sd": statistics.stdev(kl) if len(kl) > 1 else 0.0}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_+.]+", "-", name.lower())

"""Vector quantization beside scalar grids: solvers, fine-tuning around their codes, and codes that move.

Purpose: each row packs the linears inside blocks by a solver; with a recipe behind it, `block-ft` or `ft` tunes
    everything continuous (scales, signs, codebooks, norms) around the codes, `pv` moves codes too. Forward KL to the
    unquantized model. Bits count codebooks, signs and scales; the evaluated model was written packed and read back.
Command: lowbit run experiments/vq.py
Device: 2 CPU cores (any accelerator works)
Expected time: 30 minutes on 2 CPU cores (estimated from single rows)
Expected numbers: docs/vq.md
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import qat
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, ground, kept, rest_bf16, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data
from lowbit.export.open import open_model
from lowbit.formats import base
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import base as solvers
from lowbit.ptq.calibrate import tokenize
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

FORMATS = {
    2: ("rtn int2:g64:mse", "gptq int2:g64:mse", "ldlq rht:e8p2", "ldlq rht:trellis2:latin:l12", "aqlm aqlm:1x8:g4")
    + ("vptq vptq:v4:k256",),
    3: ("rtn int3:g64:mse", "gptq int3:g64:mse", "ldlq rht:e8p3", "ldlq rht:trellis3:latin:l12"),
    4: ("rtn int4:g64:mse", "gptq int4:g64:mse", "ldlq rht:e8p4", "ldlq rht:trellis4:latin:l12"),
}
ROWS = tuple(row for rows in FORMATS.values() for row in rows)
ROWS += tuple(f"{row} ft" for row in FORMATS[2][1:]) + tuple(f"{row} pv" for row in FORMATS[2][1:])


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lowbit-base"
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Each "SOLVER FORMAT", and the recipe that goes on from there if there is one."""
    keep: tuple[str, ...] = ()
    """Regular expressions of weights that stay bf16."""
    calibration_rows: int = 64
    """Rows of text that solvers calibrate on."""
    blocks: BlockOptions = BlockOptions(rows=32, valid_rows=16, quant_lr=1e-3)
    steps: int = 60
    batch_size: int = 2
    """Rows of one step end to end."""
    seq: int = 256
    """Tokens of one row."""
    lr: float = 3e-4
    """Peak learning rate end to end; codes move at 33 times as much in `pv`."""
    seed: int = 0
    data: Data = Data(eval_tokens=8192)


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    cases = {row: parse(row) for row in config.rows}
    for _, fmt, _ in cases.values():
        make_plan(config, fmt).resolve(model.config.shapes())  # refuses before hours of work
    g = ground(model, config.model, config.data, config.seq, run)
    table = [{"name": "fp", "method": "fp", **evaluate(g.fp, g.text, g.fp, config.data.convention)}]
    for row, case in cases.items():
        table.append(kept(run.path("measured", f"{slug(row)}.json"), partial(measure, config, run, g, *case)))
    names = ("name", "method", "format", "bits_per_weight_quantized", "kl_mean", "kl_p99", "same_top1", "perplexity")
    shown = [{k: row.get(k) for k in (*names, "file_bytes", "seconds")} for row in table]
    tokens = config.steps * config.batch_size * config.seq
    words = f"{table[0]['tokens']} held-out tokens; calibration on {config.calibration_rows} rows of {config.seq}; "
    words += f"{tokens} tokens end to end, {config.blocks.rows * config.blocks.epochs * config.seq} block by block."
    paths = report.write_report(shown, run.path("report"), f"Vector quantization: {Path(config.model).name}", words)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(report.text_table(shown), flush=True)


def parse(row: str) -> tuple[str, str, str | None]:
    """Solver, format and recipe of a row, all known. Raises `InputError`."""
    words = row.split()
    if len(words) not in (2, 3):
        raise InputError(f"row {row!r} (allowed: SOLVER FORMAT [RECIPE], such as 'ldlq rht:e8p2 ft')")
    solvers.get(words[0])
    if len(words) == 3:
        qat.get(words[2])
    return words[0], base.get(words[1]).name, words[2] if len(words) == 3 else None


def make_plan(config: Config, fmt: str) -> Plan:
    return Plan(tuple(Rule(k, "bf16") for k in config.keep), fmt)


def measure(config: Config, run: Run, g: Ground, solver: str, fmt: str, recipe: str | None) -> dict[str, Any]:
    """One row, evaluated from the packed folder that it was written to."""
    start = time.monotonic()
    params = solved(config, run, g, solver, fmt).params
    name = f"{solver} {fmt}"
    if recipe is not None:
        name += f" {recipe}"
        params = tuned(config, run, g, params, fmt, recipe, name)
    seconds = time.monotonic() - start
    folder = run.path("packed", slug(name))
    save_hf(g.fp.replace(params=rest_bf16(params)), folder, dtype=None, packed=True)
    done = load_hf(folder)
    scores = evaluate(done, g.text, g.fp, config.data.convention)
    print(f"{name}: KL {scores['kl_mean']:.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    row = {"name": name, "method": f"{solver} + {recipe}" if recipe else solver, "format": fmt, **scores}
    return row | {"file_bytes": sizes(done.params)["stored_bytes"], "seconds": round(seconds, 1)}


def solved(config: Config, run: Run, g: Ground, solver: str, fmt: str) -> Model:
    """The packed model that a solver gives, kept for the recipes that go on from it."""
    folder = run.path("solved", slug(f"{solver} {fmt}"))
    if not folder.exists():
        options = {} if solver == "rtn" else {"rows": config.calibration_rows, "length": config.seq}
        assignment = make_plan(config, fmt).resolve(g.fp.config.shapes())
        params = solvers.get(solver).quantize(g.fp, assignment, g.documents, **options)
        save_hf(g.fp.replace(params=params), folder, dtype=None, packed=True)
    return load_hf(folder)


def tuned(config: Config, run: Run, g: Ground, params: Tree, fmt: str, name: str, title: str) -> Tree:
    """`params` after a recipe: block by block against the unquantized blocks if it works so, then end to end."""
    recipe, o = qat.get(name), config.blocks
    assignment = make_plan(config, fmt).resolve(g.fp.config.shapes())
    if recipe.before is not None:
        tokens = tokenize(g.documents, g.fp.tokenizer, o.rows + o.valid_rows, config.seq, o.seed)
        folder = run.path("blocks", slug(title))
        params = recipe.before.run(g.fp.replace(params=params), assignment, tokens, o, folder, teacher=g.fp)
        if recipe.before.alone:
            return params
    own = {"steps": config.steps, "batch_size": config.batch_size, "lr": config.lr, "seed": config.seed}
    own |= {"warmup": 2, "loss": "kl", "log_every": 20, "keep": 1}
    settings = TrainConfig(**recipe.defaults | own)
    return recipe.convert(fit(run, title, recipe.prepare(params, assignment), settings, g.fp, g.packed, recipe))

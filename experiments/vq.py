"""Vector quantization beside scalar grids: solvers, fine-tuning around their codes, and codes that move.

Purpose: each row packs the linears inside blocks by a solver; with a recipe behind it, `ft` tunes
    everything continuous (scales, signs, codebooks, norms) around the codes, `pv` moves codes too. Forward KL to the
    unquantized model. Bits count codebooks, signs and scales; the evaluated model was written packed and read back.
Command: lowbit run experiments/vq.py
Device: 2 CPU cores (any accelerator works)
Expected time: 115 minutes on 2 CPU cores (sum of rows that were run beside other work)
Expected numbers: docs/vq.md
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lowbit import qat
from lowbit.errors import InputError, unknown
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
from lowbit.ptq.options import OPTIONS
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

FORMATS = {
    2: ("rtn int2:g64:mse", "gptq int2:g64:mse", "ldlq rht:e8p2", "ldlq rht:trellis2:latin:l12", "aqlm aqlm:1x8:g4")
    + ("vptq vptq:v4:k256",),
    3: ("rtn int3:g64:mse", "gptq int3:g64:mse", "ldlq rht:e8p3", "ldlq rht:trellis3:latin:l12")
    + ("aqlm aqlm:2x6:g4", "vptq vptq:v4:k256:r16"),
    4: ("rtn int4:g64:mse", "gptq int4:g64:mse", "ldlq rht:e8p4", "ldlq rht:trellis4:latin:l12")
    + ("aqlm aqlm:2x8:g4", "vptq vptq:v4:k256:r256"),
}
YAQA = tuple(f"yaqa rht:{code} rows=512" for k in FORMATS for code in (f"e8p{k}", f"trellis{k}:latin:l12"))
ROWS = (*(row for rows in FORMATS.values() for row in rows), *YAQA)
ROWS += tuple(f"{row} ft" for row in ROWS) + tuple(f"{row} pv" for row in FORMATS[2][1:])


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lowbit-base"
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Each "SOLVER FORMAT [OPTION=VALUE ...]", and the recipe that goes on from there if there is one."""
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
    """Peak learning rate end to end."""
    revise_every: int = 12
    """Steps between changes of codes in `pv`."""
    seed: int = 0
    data: Data = Data(eval_tokens=8192)


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    cases = {row: parse(row) for row in config.rows}
    for case in cases.values():
        make_plan(config, case.format).resolve(model.config.shapes())  # refuses before hours of work
        if case.recipe is not None:
            end_to_end(config, qat.get(case.recipe))
    g = ground(model, config.model, config.data, config.seq, run)
    table = [{"name": "fp", "method": "fp", **evaluate(g.fp, g.text, g.fp, config.data.convention)}]
    for row, case in cases.items():
        table.append(kept(run.path("measured", f"{slug(row)}.json"), partial(measure, config, run, g, case)))
    names = ("name", "method", "format", "bits_per_weight_quantized", "kl_mean", "kl_p99", "same_top1", "perplexity")
    shown = [{k: row.get(k) for k in (*names, "file_bytes", "seconds")} for row in table]
    tokens = config.steps * config.batch_size * config.seq
    words = f"{table[0]['tokens']} held-out tokens; calibration on {config.calibration_rows} rows of {config.seq}; "
    words += f"{tokens} tokens end to end, {config.blocks.rows * config.blocks.epochs * config.seq} block by block."
    paths = report.write_report(shown, run.path("report"), f"Vector quantization: {Path(config.model).name}", words)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(report.text_table(shown), flush=True)


class Case(NamedTuple):
    solver: str
    format: str
    options: dict[str, Any]
    recipe: str | None

    @property
    def start(self) -> str:
        """What the recipe goes on from."""
        return " ".join([self.solver, self.format, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def name(self) -> str:
        return self.start if self.recipe is None else f"{self.start} {self.recipe}"


def parse(row: str) -> Case:
    """What a row names, all known. Raises `InputError`."""
    if len(row.split()) < 2:
        raise InputError(f"row {row!r} (allowed: SOLVER FORMAT [OPTION=VALUE ...] [RECIPE], as 'ldlq rht:e8p2 ft')")
    solver, fmt, *more = row.split()
    solvers.get(solver)
    options: dict[str, Any] = {}
    while more and "=" in more[0]:
        key, _, value = more.pop(0).partition("=")
        known = [f.name for f in dataclasses.fields(OPTIONS[solver])] if solver in OPTIONS else []
        if key not in known:
            raise unknown(f"option of solver {solver}", key, known)
        kind = type(getattr(OPTIONS[solver](), key))
        try:
            options[key] = kind(value)
        except ValueError:
            raise InputError(f"row {row!r}: {key} is {value!r} (allowed: {kind.__name__})") from None
    if options:
        OPTIONS[solver](**options)
    if len(more) > 1:
        raise InputError(
            f"row {row!r} (allowed: SOLVER FORMAT [OPTION=VALUE ...] [RECIPE], such as 'ldlq rht:e8p2 ft')"
        )
    if more:
        qat.get(more[0])
    return Case(solver, base.get(fmt).name, options, more[0] if more else None)


def make_plan(config: Config, fmt: str) -> Plan:
    return Plan(tuple(Rule(k, "bf16") for k in config.keep), fmt)


def measure(config: Config, run: Run, g: Ground, case: Case) -> dict[str, Any]:
    """One row, evaluated from the packed folder that it was written to."""
    start = time.monotonic()
    params = solved(config, run, g, case).params
    if case.recipe is not None:
        params = tuned(config, run, g, params, case)
    seconds = time.monotonic() - start
    folder = run.path("packed", slug(case.name))
    save_hf(g.fp.replace(params=rest_bf16(params)), folder, dtype=None, packed=True)
    done = load_hf(folder)
    scores = evaluate(done, g.text, g.fp, config.data.convention)
    print(f"{case.name}: KL {scores['kl_mean']:.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    method = f"{case.solver} + {case.recipe}" if case.recipe else case.solver
    row = {"name": case.name, "method": method, "format": case.format, **scores}
    return row | {"file_bytes": sizes(done.params)["stored_bytes"], "seconds": round(seconds, 1)}


def solved(config: Config, run: Run, g: Ground, case: Case) -> Model:
    """The packed model that a solver gives, kept for the recipes that go on from it."""
    folder = run.path("solved", slug(case.start))
    if not folder.exists():
        options = {} if case.solver == "rtn" else {"rows": config.calibration_rows, "length": config.seq}
        assignment = make_plan(config, case.format).resolve(g.fp.config.shapes())
        params = solvers.get(case.solver).quantize(g.fp, assignment, g.documents, **options | case.options)
        save_hf(g.fp.replace(params=params), folder, dtype=None, packed=True)
    return load_hf(folder)


def tuned(config: Config, run: Run, g: Ground, params: Tree, case: Case) -> Tree:
    """`params` after the recipe: block by block against the unquantized blocks if it works so, then end to end."""
    recipe, o = qat.get(case.recipe), config.blocks
    assignment = make_plan(config, case.format).resolve(g.fp.config.shapes())
    if recipe.before is not None:
        tokens = tokenize(g.documents, g.fp.tokenizer, o.rows + o.valid_rows, config.seq, o.seed)
        folder = run.path("blocks", slug(case.start))  # recipes share this phase
        params = recipe.before.run(g.fp.replace(params=params), assignment, tokens, o, folder, teacher=g.fp)
        if recipe.before.alone:
            return params
    settings = end_to_end(config, recipe)
    return recipe.convert(fit(run, case.name, recipe.prepare(params, assignment), settings, g.fp, g.packed, recipe))


def end_to_end(config: Config, recipe: qat.Recipe) -> TrainConfig:
    """How a recipe trains the whole model. Raises `InputError`."""
    own = {"steps": config.steps, "batch_size": config.batch_size, "lr": config.lr, "seed": config.seed}
    own |= {"warmup": 2, "loss": "kl", "log_every": 20, "keep": 1, "revise_every": config.revise_every}
    settings = TrainConfig(**recipe.defaults | own)
    if recipe.revise is not None:
        settings.check_revisions()
    return settings

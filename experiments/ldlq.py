"""Two bits without training: what rounding, incoherence and feedback on one side or on both are worth, in one table.

Paper: GPTQ (arXiv 2210.17323), QuIP# (2402.04396: "no E8" is the half-integer grid behind a randomized Hadamard
    transform with LDLQ), YAQA (2505.22988). Every row is a format and a solver, with the solver's options, on the same
    model; the same rows of calibration text, none of which is measured on.
Command: lowbit run experiments/ldlq.py
Device: 2 CPU cores
Expected time: 30 minutes
Expected numbers: docs/vq_ldlq.md has them
"""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.run import Run, write_json
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.open import open_model
from lowbit.formats import base as formats
from lowbit.plan import Plan
from lowbit.ptq import base as solvers
from lowbit.ptq.options import AqlmOptions, GptqOptions, LdlqOptions, LnqOptions, VptqOptions, YaqaOptions

GRID = "int2:channel:midrise:mse"
ROWS = (
    f"{GRID} rtn",
    f"rht:{GRID} rtn",
    f"{GRID} gptq",
    f"{GRID} ldlq",
    f"rht:{GRID} ldlq",
    f"rht128:blocks:{GRID} ldlq",
    f"rht:{GRID} ldlq sweeps=4",
    f"{GRID} yaqa",
    f"rht:{GRID} yaqa",
)
OPTIONS = {o.solver: o for o in (GptqOptions, LdlqOptions, YaqaOptions, AqlmOptions, VptqOptions, LnqOptions)}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lowbit-base"
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Each "FORMAT SOLVER [OPTION=NUMBER ...]"."""
    calibration_rows: int = 64
    """Rows of calibration text; solvers that take another number have it among their options."""
    length: int = 256
    """Tokens of a row of calibration text."""
    data: Data = Data(eval_tokens=8192)


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    if model.tokenizer is None:
        raise InputError(f"model {config.model} has no tokenizer (allowed: a model with one)")
    cases = [parse(row, config) for row in config.rows]
    documents, held_out, _ = split(config.data, model, read_documents(config.data))
    text = first_tokens(model, held_out, config.data.eval_tokens)
    fp = model.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params))
    table: list[dict[str, Any]] = []
    for row, (name, solver, options) in zip(config.rows, cases, strict=True):
        saved = run.path("measured", re.sub(r"[^a-z0-9_+.]+", "-", row) + ".json")
        if not saved.exists():
            began = time.monotonic()
            assignment = Plan.uniform(name).resolve(fp.config.shapes())
            params = solvers.get(solver).quantize(fp, assignment, documents, **options)
            seconds = time.monotonic() - began
            scores = evaluate(fp.replace(params=params), text, fp, config.data.convention)
            scores["file_bytes"] = sizes(params)["stored_bytes"]  # nothing is written: what a folder would hold
            write_json(saved, {"name": row, "method": solver, **scores, "seconds": round(seconds, 1)})
            print(f"{row}: KL {scores['kl_mean']:.4g} in {seconds:.0f} s", file=sys.stderr, flush=True)
        table.append(json.loads(saved.read_text()))
    hidden = ("types", "convention", "tokens", "windows", "perplexity_stderr")
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in table]
    title = f"{Path(config.model).name}: solvers"
    paths = report.write_report(shown, run.path("report"), title, f"{table[0]['tokens']} held-out tokens.")
    run.summary(rows=table, report=str(paths["report.html"]))
    print(report.text_table(shown), flush=True)


def parse(row: str, config: Config) -> tuple[str, str, dict[str, Any]]:
    """Format, solver and its options of a row, all of them known. Raises `InputError`."""
    name, solver, *more = row.split() if len(row.split()) > 1 else (row, "")
    options: dict[str, Any] = {"rows": config.calibration_rows, "length": config.length} if solver in OPTIONS else {}
    for item in more:
        key, equals, value = item.partition("=")
        if solver not in OPTIONS or not equals or key not in OPTIONS[solver].__dataclass_fields__:
            raise InputError(f"row {row!r}: {item!r} (allowed: FORMAT SOLVER OPTION=VALUE, options of the solver)")
        options[key] = value if not re.fullmatch(r"[\d.e-]+", value) else float(value) if "." in value else int(value)
    solvers.get(solver)
    if solver in OPTIONS:
        OPTIONS[solver](**options)
    return formats.get(name).name, solver, options

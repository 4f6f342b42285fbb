"""Four bits for weights, activations and the cache: what rotations and smoothing are worth, in one table.

Paper: QuaRot (arXiv 2404.00456), SpinQuant (2405.16406), SmoothQuant (2211.10438), FlatQuant (2410.09426), GPTQ
    (2210.17323). Every row is a transform and a solver on the same model, calibration text and formats: per-channel
    symmetric weights with an MSE-searched scale, symmetric inputs per token, asymmetric keys and values per token and
    head. `--planted` first changes the model to one that computes the same and has outliers: the residual stream in its
    principal axes, a few channels of `down_proj`'s input times `--outlier`.
Command: lowbit run experiments/w4a4kv4.py
Device: 2 CPU cores
Expected time: 60 minutes, most of it learning (11 for stories260K)
Expected numbers: KL 0.114 of RTN, 0.052 of QuaRot, 0.040 of QuaRot with GPTQ on lowbit-base (docs/rotations.md has all)
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import sizes
from lowbit.experiment import report
from lowbit.experiment.ground import as_float32, kept, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.open import open_model
from lowbit.models.decoder import block, embed
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import base as solvers
from lowbit.ptq import calibrate
from lowbit.rotations import base as transforms
from lowbit.rotations.fold import State, apply

ROWS = (
    "none rtn",
    "none gptq",
    "smoothquant:all:n32 rtn",
    "quarot rtn",
    "quarot gptq",
    "spinquant:r1+r2:w:b4:len256 rtn",
    "spinquant:w:b4:len256 rtn",
    "spinquant:r1+r2+r3+r4+across:w:b4:len256 rtn",
    "spinquant:b4:len256 gptq",
    "spinquant:r1+r2+r3+r4+across:b4:len256 gptq",
    "flatquant:len256 rtn",
)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lowbit-base"
    """Folder, file, run directory, hub id or name in the package."""
    rows: tuple[str, ...] = ROWS
    """Each "TRANSFORM SOLVER"."""
    weights: str = "int4:mse"
    inputs: str = "int4:token:r0.9"
    """Activation format of every linear inside blocks; none: unquantized."""
    kv: str = "int4:token:asym"
    """Cache format of keys and values; none: unquantized."""
    planted: bool = False
    """Measure a model with the same function that has outlier channels."""
    outlier: float = 10.0
    calibration_rows: int = 64
    """Rows of GPTQ's calibration text."""
    length: int = 256
    """Tokens of a row of calibration text."""
    data: Data = Data(eval_tokens=8192)


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    if model.tokenizer is None:
        raise InputError(f"model {config.model} has no tokenizer (allowed: a model with one)")
    cases = [parse(row) for row in config.rows]
    documents, held_out, _ = split(config.data, model, read_documents(config.data))
    text = first_tokens(model, held_out, config.data.eval_tokens)
    fp = as_float32(model)
    start = plant(fp, documents, config.outlier) if config.planted else fp
    plan = make_plan(config)

    def measure(transform: str, solver: str) -> dict[str, Any]:
        began = time.monotonic()
        rotated = transforms.transform(start, transform, documents, plan.resolve(start.config.shapes()))
        same = evaluate(rotated, text[:1], fp, config.data.convention)["kl_mean"]
        quantized = solve(rotated, plan, solver, documents, config)
        seconds = time.monotonic() - began
        scores = evaluate(quantized, text, fp, config.data.convention)
        row = {"name": f"{transform} + {solver}", "method": transform.split(":")[0], **scores}
        row["file_bytes"] = sizes(quantized.params)["stored_bytes"]  # nothing is written: what a folder would hold
        print(f"{row['name']}: KL {scores['kl_mean']:.4g} in {seconds:.0f} s", file=sys.stderr, flush=True)
        return row | {"kl_transform": same, "seconds": round(seconds, 1)}

    path = partial(run.path, "measured")
    table = [kept(path(f"{slug(f'{t}-{s}')}.json"), partial(measure, t, s)) for t, s in cases]
    hidden = ("types", "convention", "tokens", "windows", "perplexity_stderr", "kl_mean_stderr")
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in table]
    what = f"{config.weights} weights, {config.inputs} inputs, {config.kv} cache"
    title = f"{Path(config.model).name}{' with planted outliers' if config.planted else ''}: {what}"
    paths = report.write_report(shown, run.path("report"), title, f"{table[0]['tokens']} held-out tokens.")
    run.summary(rows=table, report=str(paths["report.html"]))
    print(report.text_table(shown), flush=True)


def parse(row: str) -> tuple[str, str]:
    """The transform and the solver of a row, both known. Raises `InputError`."""
    words = row.split()
    if len(words) != 2:
        raise InputError(f"row {row!r} (allowed: TRANSFORM SOLVER, such as 'quarot gptq')")
    if words[0] != "none":
        transforms.get(words[0])
    solvers.get(words[1])
    return words[0], words[1]


def make_plan(config: Config) -> Plan:
    rules = []
    if config.inputs != "none":
        rules.append(Rule(r"model\.layers\..*:in", config.inputs))
    if config.kv != "none":
        rules.append(Rule(r"model\.layers\..*\.[kv]_cache", config.kv))
    return Plan(tuple(rules), config.weights)


def solve(model: Model, plan: Plan, solver: str, documents: list[str], config: Config) -> Model:
    """The model with the plan's formats; GPTQ takes its Hessians on unquantized activations."""
    options = {"rows": config.calibration_rows, "length": config.length} if solver == "gptq" else {}
    params = solvers.get(solver).quantize(model, plan.resolve(model.config.shapes()), documents, **options)
    return model.replace(params=params)


def plant(model: Model, documents: list[str], outlier: float) -> Model:
    """The same function with outliers: the residual stream rotated into its principal axes, so that most of its energy
    lies in few channels, and 1 in 32 channels of `down_proj`'s input scaled up."""
    c = model.config
    folded = apply(model, State("norms", norms=True))
    tokens = calibrate.tokenize(documents, model.tokenizer, 16, min(256, c.max_position))
    x = embed(folded.params, jnp.asarray(tokens), c, jnp.float32)
    layer = jax.jit(block, static_argnums=0)
    second_moment = np.zeros((c.hidden_size, c.hidden_size))
    for i in range(c.num_layers):
        x, _ = layer(c, folded.params["model"]["layers"][str(i)], x, i)
        flat = np.asarray(x, np.float64).reshape(-1, c.hidden_size)
        second_moment += flat.T @ flat / np.square(flat).sum()
    _, axes = np.linalg.eigh(second_moment)
    rng, smooth = np.random.default_rng(0), {}
    for i in range(c.num_layers):
        s = np.ones(c.intermediate_size)
        s[rng.choice(c.intermediate_size, max(1, c.intermediate_size // 32), replace=False)] = 1 / outlier
        smooth[f"model.layers.{i}.mlp.down_proj"] = s
    return apply(model, State("planted", norms=True, residual=axes, smooth=smooth))

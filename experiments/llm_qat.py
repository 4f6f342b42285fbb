"""LLM-QAT on karpathy's stories260K: weights, activations and cache at 4 and 8 bits, with real text and without any.

Paper: LLM-QAT (arXiv 2305.17888). For each W-A-KV: rounding to nearest, the recipe `llm-qat` on real text, and on
    text that the model wrote itself, starting from every token of its vocabulary. The same number of tokens, steps and
    the same teacher; all are measured against the fp model on real text that none was trained on.
Command: lowbit run experiments/llm_qat.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 4 minutes on 2 CPU cores, 9 where others keep them busy
Expected numbers: KL mean of RTN, real text, its own text: 1.211, 0.794, 0.822 at 4-8-4; 0.176, 0.079, 0.085 at 4-8-8;
    0.908, 0.646, 0.677 at 8-8-4
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from lowbit import qat
from lowbit.data import corpus, rows
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.experiment import report
from lowbit.experiment.ground import fit, ground, kept, slug
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import Run, write_json
from lowbit.experiment.texts import Data
from lowbit.export.open import open_model
from lowbit.models import synthesize
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.qat.llm_qat import as_published
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"


@dataclasses.dataclass(frozen=True)
class Opt:
    """AdamW with a cosine schedule to 0, as published but for the learning rate: the paper's 2e-5 is for models of
    billions of weights and thousands of steps."""

    lr: float = 3e-4
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
    bits: tuple[str, ...] = ("4-8-4", "4-8-8", "8-8-4")
    """Weights, activations and cache: symmetric min-max, per row, per token, per token and head."""
    recipe: str = "llm-qat"
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt")
    synthesis: synthesize.Settings = synthesize.Settings()
    """The text that the model writes: by default a row for each token of its vocabulary."""
    opt: Opt = Opt()


def run(config: Config, run: Run) -> None:
    model = open_model(config.model)
    assignments = {bits: assign(bits, model) for bits in config.bits}
    g = ground(model, config.model, config.data, config.opt.seq, run)
    fp = g.fp
    written = run.path("written.jsonl")
    if not written.exists():
        with Progress("synthesize", synthesize.check(fp, config.synthesis), pause=2.0) as progress:
            done = synthesize.write(fp, config.synthesis, written, lambda done, _, rate: progress.update(done))
        write_json(run.path("written.json"), dataclasses.asdict(done))
    own = rows.prepare(corpus.documents(written), model.tokenizer, config.opt.seq, run.path("rows-own"))
    packed = {"real text": g.packed, "its own text": own}

    table: list[dict[str, Any]] = []

    def measure(name: str, make: Any, **kind: str) -> None:
        def found() -> dict[str, Any]:
            start = time.monotonic()
            params = make()
            seconds = time.monotonic() - start
            scores = evaluate(fp.replace(params=params), g.text, fp, config.data.convention)
            print(f"{name}: KL {scores['kl_mean']:.4g}, perplexity {scores['perplexity']:.4f}", file=sys.stderr)
            return {"name": name, **kind, **scores, "seconds": round(seconds, 1)}

        table.append(kept(run.path("measured", f"{slug(name)}.json"), found))

    measure("fp", lambda: fp.params, method="fp")
    for bits, assignment in assignments.items():
        measure(f"RTN {bits}", lambda a=assignment: rtn.quantize(fp.params, a), method="RTN", format=bits)
        for source, found in packed.items():
            name = f"QAT {bits} {source}"
            measure(
                name, lambda a=assignment, f=found, n=name: trained(config, run, n, fp, f, a), method="QAT", format=bits
            )

    tokens = config.opt.steps * config.opt.batch_size * config.opt.seq
    shown = [
        {k: row.get(k) for k in ("name", "method", "format", "kl_mean", "same_top1", "perplexity")} for row in table
    ]
    notes = (
        f"{tokens} tokens trained on in every QAT row, out of {len(own) * config.opt.seq} that the model wrote or "
        f"{len(packed['real text']) * config.opt.seq} real ones; {table[0]['tokens']} held-out tokens."
    )
    paths = report.write_report(shown, run.path("report"), f"LLM-QAT: {Path(config.model).name}", notes)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(f"{report.text_table(shown)}\n{notes}", flush=True)


def assign(bits: str, model: Model) -> dict[str, Any]:
    """`{site: format}` of `W-A-KV`, as the paper rounds. Raises `InputError`."""
    try:
        w, a, kv = (int(n) for n in bits.split("-"))
    except ValueError as e:
        raise InputError(f"bits {bits!r} (allowed: weights, activations and cache, such as 4-8-4)") from e
    rules = (
        Rule(r"model\.layers\..*:in", f"int{a}:token"),
        Rule(r"model\.layers\..*\.[kv]_cache", f"int{kv}:token"),
    )
    assignment = Plan(rules, f"int{w}").resolve(model.config.shapes())
    return {site: as_published(site, fmt) for site, fmt in assignment.items()}


def trained(config: Config, run: Run, name: str, fp: Model, packed: rows.Rows, assignment: dict[str, Any]) -> Tree:
    """Packed parameters after training; goes on from a checkpoint in a resumed run."""
    recipe, opt = qat.get(config.recipe), config.opt
    same = {"steps": opt.steps, "batch_size": opt.batch_size, "lr": opt.lr, "seed": opt.seed, "loss": "kl"}
    settings = TrainConfig(**recipe.defaults | same | {"log_every": 10, "keep": 1})
    return recipe.convert(fit(run, name, recipe.prepare(fp.params, assignment), settings, fp, packed))


def dry_run(config: Config) -> dict[str, Any]:
    """The layer -> rule -> format -> bits table of every W-A-KV."""
    model = open_model(config.model)
    return {bits: {site: fmt.name for site, fmt in assign(bits, model).items()} for bits in config.bits}

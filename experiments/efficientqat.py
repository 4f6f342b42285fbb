"""EfficientQAT on a small model: blocks one by one, scales end to end, both, and neither.

Paper: EfficientQAT (arXiv 2407.11062). Rows: the checkpoint rounded to nearest; Block-AP alone; E2E-QP alone, on the
    rounded codes; E2E-QP on the codes of Block-AP. Block-AP minimises each block's squared error, E2E-QP the forward KL
    to the checkpoint (the paper: cross-entropy). Every result is written packed, read back, and measured on held-out
    text. Learning rates are those of a model of 260 thousand parameters, far above the paper's for 7 billion.
Command: lowbit run experiments/efficientqat.py
Device: 2 CPU cores; the model and TinyStories lie in the folder that LOWBIT_SHARED names (default ../shared)
Expected time: 9 minutes, measured on 2 CPU cores with a load of 10; a few on free ones
Expected numbers: KL at int2 3.90 rounded, 1.77 E2E-QP, 0.87 Block-AP, 0.74 both; at int3 0.61, 0.34, 0.17, 0.14;
    at int4 0.087, 0.061, 0.040, 0.035
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import qat
from lowbit.evaluate.perplexity import evaluate
from lowbit.evaluate.size import file_bytes, sizes
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, kept, open_ground, slug
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import Run
from lowbit.experiment.texts import Data
from lowbit.formats import base
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.ptq.calibrate import tokenize
from lowbit.qat.block_ap import block_ap
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.tree import Tree

SHARED = Path(os.environ.get("LOWBIT_SHARED", "../shared")) / "data"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = str(SHARED / "models/stories260K/stories260K.bin")
    """Folder, file, run directory, hub id or name in the package."""
    formats: tuple[str, ...] = ("int2:g64:asym", "int3:g64:asym", "int4:g64:asym")
    """Formats of the linears inside blocks; trained with `:rounded`, the paper's gradient at the ends of the grid."""
    keep: tuple[str, ...] = (r".*\.mlp\.down_proj",)
    """Regular expressions of weights that stay as they are (rows of 172 have no group of 64)."""
    seq: int = 256
    """Tokens of a row."""
    blocks: BlockOptions = BlockOptions(weight_lr=2e-3, quant_lr=3e-3)
    e2e_steps: int = 64
    e2e_batch: int = 4
    """Rows of a step."""
    e2e_lr: float = 1e-3
    """Peak learning rate of the scales of 2 bits on the codes of Block-AP. Scales of N bits are about 3 / (2^N - 1) as
    large, and so is their rate."""
    e2e_lr_rounded: float = 1e-2
    """The same on rounded codes, which are further off."""
    data: Data = Data(path=SHARED / "corpora/tinystories/ts_val_decoded.txt")


def run(config: Config, run: Run) -> None:
    g = open_ground(config.model, config.data, config.seq, run)
    fp, text = g.fp, g.text
    plans = {f: make_plan(config, f).resolve(fp.config.shapes()) for f in config.formats}
    o, length = config.blocks, min(config.seq, fp.config.max_position)
    tokens = tokenize(g.documents, fp.tokenizer, o.rows + o.valid_rows, o.length or length, o.seed)
    table: list[dict[str, Any]] = []

    def measure(name: str, make: Callable[[], Tree], trained: int, **kind: str) -> Path:
        """Makes a model, writes it, and evaluates what was written; keeps what an earlier start did."""
        folder = run.path("packed", slug(name))

        def found() -> dict[str, Any]:
            begin = time.monotonic()
            params = make()
            seconds = time.monotonic() - begin
            if not folder.exists():
                save_hf(fp.replace(params=params), folder, dtype=None, packed=True)
            written = load_hf(folder)
            scores = evaluate(written, text, fp, config.data.convention)
            row = {"name": name, **kind, **scores, **sizes(written.params), "file_bytes": file_bytes(folder)}
            note = f"{name}: KL {scores['kl_mean']:.4g}, perplexity {scores['perplexity']:.3f}, {seconds:.0f} s"
            print(note, file=sys.stderr, flush=True)
            return row | {"tokens_trained": trained, "seconds": round(seconds, 1)}

        table.append(kept(run.path("measured", f"{slug(name)}.json"), found))
        return folder

    each, total = tokens.shape[1] * o.rows * o.epochs, config.e2e_steps * config.e2e_batch * length
    measure("fp", lambda: fp.params, 0, method="fp")
    for fmt, assignment in plans.items():
        part = partial(end_to_end, config, run, g, assignment)
        low, high = base.get(fmt).levels
        size = 3 / (high - low)
        measure(f"RTN {fmt}", partial(rtn.quantize, fp.params, assignment), 0, method="RTN", format=fmt)
        blocks = partial(by_blocks, config, run, fp, fmt, assignment, tokens)
        done = measure(f"Block-AP {fmt}", blocks, each, method="Block-AP", format=fmt)
        rounded = partial(part, f"e2e {fmt}", lambda: fp.params, config.e2e_lr_rounded * size)
        measure(f"E2E-QP {fmt}", rounded, total, method="E2E-QP", format=fmt)
        both = partial(part, f"both {fmt}", lambda done=done: load_hf(done).params, config.e2e_lr * size)
        measure(f"Block-AP + E2E-QP {fmt}", both, each + total, method="both", format=fmt)

    hidden = ("convention", "tokens", "windows", "perplexity_stderr", "kl_mean_stderr", "params", "stored_bytes")
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in table]
    words = f"{table[0]['tokens']} held-out tokens; Block-AP on {each} tokens of {o.rows} rows, E2E-QP on {total}."
    paths = report.write_report(shown, run.path("report"), f"EfficientQAT: {Path(config.model).name}", words)
    run.summary(rows=table, report=str(paths["report.html"]))
    print(report.text_table(shown), flush=True)


def make_plan(config: Config, fmt: str) -> Plan:
    return Plan(tuple(Rule(k, "bf16") for k in config.keep), f"{fmt}:rounded")


def by_blocks(config: Config, run: Run, fp: Model, fmt: str, assignment: dict[str, Any], tokens: Any) -> Tree:
    part = run.sub(slug(f"blocks {fmt}"))
    part.rewind(-1)  # blocks that are done report again
    with Progress(f"blocks {fmt}", fp.config.num_layers, every=1) as progress:

        def on_block(found: dict[str, Any], blocks: int) -> None:
            part.log(found["block"] + 1, **found)
            shown = {"mse": found["valid_mse"], "rounded": found["start_mse"], "s": found["seconds"]}
            progress.update(found["block"] + 1, **shown)

        return block_ap(fp, assignment, tokens, config.blocks, part.path("state"), on_block)


def end_to_end(
    config: Config, run: Run, g: Ground, assignment: dict[str, Any], name: str, start: Callable[[], Tree], lr: float
) -> Tree:
    recipe = qat.get("e2e-qp")
    same = {"loss": "kl", "steps": config.e2e_steps, "batch_size": config.e2e_batch, "warmup": 2, "log_every": 8}
    same |= {"lr": lr, "save_every": max(1, config.e2e_steps // 4), "keep": 1}
    settings = TrainConfig(**recipe.defaults | same)
    return recipe.convert(fit(run, name, recipe.prepare(start(), assignment), settings, g.fp, g.packed))

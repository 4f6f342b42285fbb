"""From a pretrained model to low-bit files that other runtimes run: RTN and QAT at 4, 2 and 1.58 bits, side by side.

Purpose: the whole path on real input. From one checkpoint: fp, round-to-nearest and quantization-aware training on the
    grids of GGUF's Q4_0, Q2_0 and TQ2_0; every result is evaluated on held-out text, exported, read back and compared.
    QAT minimises forward KL to the frozen fp checkpoint; 'fp, trained equally long' continues cross-entropy training on
    the same rows instead, which shows what more training alone does.
Command: lowbit run experiments/quickstart.py
Device: 2 CPU cores (any accelerator works)
Expected time: 8 minutes on 2 CPU cores
Expected numbers: KL mean of RTN and QAT 0.0106 and 0.0062 at q4_0, 0.273 and 0.083 at int2:g64, 1.69 and 0.130 at tq2_0
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import qat
from lowbit.data import contamination, rows
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.experiment import report
from lowbit.experiment.ground import Ground, fit, ground, kept, rest_bf16, slug
from lowbit.experiment.run import Run
from lowbit.experiment.texts import HASHES, Data, read_documents
from lowbit.export.api import export
from lowbit.export.open import open_model
from lowbit.formats import base as formats
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.train import memory
from lowbit.train.config import TrainConfig
from lowbit.train.objective import language
from lowbit.tree import Tree

BASE = "lowbit-base"


@dataclasses.dataclass(frozen=True)
class Opt:
    """AdamW with a cosine schedule, the same number of steps for every trained row."""

    lr: float = 5e-4
    """Peak learning rate of QAT at 3 bits and below."""
    lr_high: float = 1e-4
    """Peak learning rate of QAT above 3 bits, and of the fp row."""
    scale_lr: float = 1.0
    """Learning rate of learned scales, times that of the weights."""
    steps: int = 160
    batch_size: int = 2
    """Rows of one step."""
    seq: int = 256
    """Tokens of one row."""
    warmup: int = 2
    seed: int = 0

    def config(self, lr: float, **changes: Any) -> TrainConfig:
        """Settings of a trained row."""
        same = {"steps": self.steps, "batch_size": self.batch_size, "warmup": self.warmup, "seed": self.seed}
        same |= {"scale_lr": self.scale_lr}
        every = max(1, self.steps // 4)
        return TrainConfig(**same | {"lr": lr, "log_every": 8, "save_every": every, "keep": 1} | changes)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = BASE
    """Folder, file, run directory, hub id or name in the package."""
    pretrain: bool = False
    """Train a tiny byte-level Llama first, on a part of the text that is not used again, and use it as the model."""
    pretrain_steps: int = 150
    formats: tuple[str, ...] = ("q4_0", "int2:g64", "tq2_0")
    """Formats of the linears inside blocks; each gets a row RTN and a row QAT."""
    keep: tuple[str, ...] = ()
    """Regular expressions of weights that stay bf16."""
    data: Data = Data()
    opt: Opt = Opt()


def run(config: Config, run: Run) -> None:
    documents = read_documents(config.data)
    base = pretrained(config, run, documents) if config.pretrain else open_model(config.model)
    shapes = base.config.shapes()
    assignments = {f: make_plan(config, f).resolve(shapes) for f in config.formats}
    g = ground(base, config_name(config), config.data, config.opt.seq, run, documents)
    fp = g.fp
    table: list[dict[str, Any]] = []

    def measure(name: str, make: Callable[[], Tree], target: str = "gguf:auto", **kind: str) -> None:
        """Makes a model, exports it, reads the file back, evaluates what was read; keeps a row of an earlier start."""

        def found() -> list[dict[str, Any]]:
            start = time.monotonic()
            params = make()
            seconds = time.monotonic() - start
            file = run.path("export", f"{slug(name)}.gguf")
            written = export(fp.replace(params=params), target, file)
            first = not table
            scores = evaluate(open_model(file), g.text, fp, config.data.convention, self_noise=first)
            floor = {"name": "fp in bfloat16 (noise floor)", "method": "noise"} | scores.pop("self_noise", {})
            row = {"name": name, **kind, **scores, "seconds": round(seconds, 1)}
            row |= {"types": written["types"], "kl_export": written["kl_mean"]}
            say(f"{name}: KL {scores['kl_mean']:.4g}, perplexity {scores['perplexity']:.3f}, {seconds:.0f} s")
            return [row, floor] if first else [row]

        table.extend(kept(run.path("measured", f"{slug(name)}.json"), found))

    plain = all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(base.params))
    measure("fp", lambda: base.params, "gguf:BF16" if plain else "gguf:F32", method="fp")
    plain_training = config.opt.config(config.opt.lr_high, loss="ce")
    longer = partial(trained, run, g, "fp", {}, plain_training)
    measure("fp, trained equally long", longer, "gguf:BF16", method="fp")
    for fmt, assignment in assignments.items():
        low = low_bit(config, fmt, shapes)
        settings = config.opt.config(config.opt.lr if low else config.opt.lr_high, loss="kl")
        measure(f"RTN {fmt}", partial(rounded, fp, assignment), method="RTN", format=fmt)
        assignment = make_plan(config, learner(fmt)).resolve(shapes)
        learned = partial(trained, run, g, fmt, assignment, settings)
        measure(f"QAT {fmt}", learned, method="QAT", format=fmt)

    tokens = config.opt.steps * config.opt.batch_size * min(config.opt.seq, base.config.max_position)
    hidden = ("types", "convention", "tokens", "windows", "perplexity_stderr", "kl_mean_stderr")
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in table]
    notes = describe(config, table[0], tokens, g)
    paths = report.write_report(shown, run.path("report"), f"Quickstart: {config_name(config)}", notes)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(report.text_table(shown), flush=True)


def dry_run(config: Config) -> dict[str, Any]:
    """Bytes of each device in a QAT step, and the layer -> rule -> format -> bits table of every format."""
    model = tiny(config, ByteTokenizer()) if config.pretrain else open_model(config.model).config
    out: dict[str, Any] = {}
    for fmt in config.formats:
        shapes = model.shapes()
        table = make_plan(config, fmt).table(shapes)
        assignment = make_plan(config, learner(fmt)).resolve(shapes)
        settings = config.opt.config(config.opt.lr, loss="kl")

        def student(assignment: dict[str, Any] = assignment) -> Tree:
            return qat.get("ste-learned").prepare(init_params(model, jax.random.key(0)), assignment)

        batch = {k: ((settings.batch_size, config.opt.seq + 1), jnp.int32) for k in ("tokens", "segments")}
        goal = language(model, settings, model)
        step = memory.estimate(student, batch, goal, settings, lambda: init_params(model, jax.random.key(0)))
        out[fmt] = {"per_device": dataclasses.asdict(step), "tensors": [dataclasses.asdict(row) for row in table]}
    return out


def config_name(config: Config) -> str:
    return "a byte-level Llama trained here" if config.pretrain else config.model


def make_plan(config: Config, fmt: str) -> Plan:
    return Plan((*(Rule(k, "bf16") for k in config.keep),), fmt)


def low_bit(config: Config, fmt: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors that `fmt` quantizes take 3 bits a weight or less."""
    return max((row.bits for row in make_plan(config, fmt).table(shapes) if not row.kept), default=16.0) <= 3


def learner(fmt: str) -> str:
    """The format that QAT trains by recipe ste-learned: the grid of `fmt`, its scales (of either sign if it has that)
    started from a search for the least squared error and learned by LSQ's gradient."""
    for keys in (":signmse:lsq", ":mse:lsq", ":lsq"):
        try:
            return formats.get(fmt + keys).name
        except InputError:  # a key that the format lacks, or has in another value already
            continue
    return fmt


def rounded(fp: Model, assignment: dict[str, Any]) -> Tree:
    """`fp` rounded to nearest."""
    return rest_bf16(rtn.quantize(fp.params, assignment))


def trained(run: Run, g: Ground, name: str, assignment: dict[str, Any], settings: TrainConfig) -> Tree:
    """The model after training by recipe ste-learned (without an `assignment`: plain training), as it is stored."""
    recipe = qat.get("ste-learned")
    params = fit(run, f"train {name}", recipe.prepare(g.fp.params, assignment), settings, g.fp, g.packed)
    return rest_bf16(recipe.convert(params))


def tiny(config: Config, tokenizer: ByteTokenizer) -> ModelConfig:
    """A byte-level Llama of two layers whose widths every format divides."""
    return ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position=config.opt.seq,
        tied=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tuple(tokenizer.eos_ids),
    )


def pretrained(config: Config, run: Run, documents: list[str]) -> Model:
    """`tiny`, trained on half of the documents; their hashes lie beside it, so that `split` leaves them out."""
    out = run.path("pretrained")
    if not (out / HASHES).exists():
        tokenizer = ByteTokenizer()
        model = Model(tiny(config, tokenizer), {}, tokenizer)
        half = contamination.split(documents, 0.5).train
        packed = rows.prepare(half, tokenizer, config.opt.seq, run.path("pretraining_rows"))
        settings = config.opt.config(
            5e-3, steps=config.pretrain_steps, loss="ce", optimizer="muon", schedule="wsd", decay=0.5
        )
        params = init_params(model.config, jax.random.key(config.opt.seed))
        params = fit(run, "pretrain", params, settings, model, packed)
        if not out.exists():
            save_hf(model.replace(params=params), out)
        contamination.Contamination.of(half).save(out / HASHES)
    return load_hf(out)


def describe(config: Config, fp: dict[str, Any], tokens: int, g: Ground) -> str:
    """The text above the table."""
    rules = [f"`{k}` stays bf16" for k in config.keep] + ["every other linear inside blocks gets the row's format"]
    source = config.data.path or config.data.hub or "the text of this Python installation"
    pretraining = (
        "what the model was pretrained on is not known"
        if g.overlap is None
        else f"{g.overlap} left out because the model was pretrained on a part of them"
    )
    return "\n\n".join(
        [
            f"Text: {source}; {len(g.documents)} documents trained on, {g.held_out} held out, {pretraining};"
            f" {fp['tokens']} tokens evaluated, convention {fp['convention']}, reference the fp model in float32.",
            f"Each trained row: {tokens} tokens. QAT minimises forward KL to the fp model, by straight-through"
            " estimation with scales that start from an MSE search and are learned (LSQ).",
            f"Rules, first match wins: {'; '.join(rules)}. Embeddings, head and norms stay bf16.",
            "Every row was exported to GGUF, read back, and measured from the file.",
        ]
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

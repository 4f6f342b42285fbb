"""From a pretrained model to low-bit files that other runtimes run: RTN and QAT at 4, 2 and 1.58 bits, side by side.

Purpose: the whole path on real input. From one checkpoint: fp, round-to-nearest and quantization-aware training on the
    grids of GGUF's Q4_0, Q2_0 and TQ2_0; every result is evaluated on held-out text, exported, read back and compared.
    QAT minimises forward KL to the frozen fp checkpoint; 'fp, trained equally long' continues cross-entropy training on
    the same rows instead, which shows what more training alone does.
Command: lowbit run experiments/quickstart.py
Device: 2 CPU cores (any accelerator works)
Expected time: 8 minutes on 2 CPU cores
Expected numbers: KL mean of QAT over RTN about 1/2 at q4_0, below 1/3 at int2:g64 and tq2_0
"""

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import qat
from lowbit import tree as trees
from lowbit.data import contamination, corpus, rows
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.experiment import report
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import Run, write_json
from lowbit.export.api import export
from lowbit.export.open import open_model
from lowbit.formats.base import QTensor
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.tree import Tree

BASE = "lowbit-base"
HASHES = "training_hashes.npz"  # beside a model whose training text is known


@dataclasses.dataclass(frozen=True)
class Data:
    """Default: prose and source code that every Python installation carries, without what the model was trained on."""

    path: Path | None = None
    """A text, .jsonl file or folder instead."""
    hub: str | None = None
    """A hub data set by name instead."""
    held_out: float = 0.25
    """Part of the documents that is evaluated on and never trained on."""
    eval_tokens: int = 16384
    """Tokens evaluated on, at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = BASE
    """Folder, file, run directory, hub id or name in the package."""
    pretrain: bool = False
    """Train a tiny byte-level Llama first, on the same text, and use it instead of the model."""
    formats: tuple[str, ...] = ("q4_0", "int2:g64", "tq2_0")
    """Formats of the linears inside blocks; each gets a row RTN and a row QAT."""
    keep: tuple[str, ...] = ()
    """Regular expressions of weights that stay bf16."""
    data: Data = Data()
    seq: int = 256
    """Tokens of one training row."""
    lr: float = 1e-3
    """Peak learning rate of QAT at 3 bits and below."""
    lr_high: float = 1e-4
    """Peak learning rate of QAT above 3 bits, and of the fp row."""
    train: TrainConfig = TrainConfig(steps=24, batch_size=8, loss="kl", warmup=2, log_every=4, save_every=12)
    """Of each trained row; its loss and lr are set by the rows."""
    pretrain_steps: int = 150


def run(config: Config, run: Run) -> None:
    documents = read_documents(config.data)
    base = pretrained(config, run, documents) if config.pretrain else open_model(config.model)
    if base.tokenizer is None:
        raise InputError(f"model {config.model} has no tokenizer (allowed: a model with one)")
    assignments = {f: make_plan(config, f).resolve(base.config.shapes()) for f in config.formats}
    fp = base.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), base.params))
    train_documents, held_out, overlap = split(config.data, base, documents)
    packed = rows.prepare(train_documents, base.tokenizer, min(config.seq, base.config.max_position), run.path("rows"))
    text = first_tokens(base, held_out, config.data.eval_tokens)

    def measure(name: str, make: Callable[[], Tree], target: str, noise: bool = False, **kind: str) -> None:
        """Makes a model, exports it, reads the file back, evaluates what was read; a row that is there is kept."""
        slug = re.sub(r"[^a-z0-9_]+", "-", name.lower())
        saved = run.path("measured", f"{slug}.json")
        if saved.exists():
            return
        start = time.monotonic()
        params = make()
        model = fp.replace(params=params if params is base.params else rest_bf16(params))
        seconds = time.monotonic() - start
        file = run.path("export", f"{slug}.gguf")
        written = export(model, target, file)
        scores = evaluate(open_model(file), text, fp, self_noise=noise)
        floor = {"name": "fp in bfloat16 (noise floor)", "method": "noise"} | scores.pop("self_noise", {})
        row = {"name": name, **kind, **scores, "seconds": round(seconds, 1)}
        row |= {"types": written["types"], "kl_export": written["kl_mean"]}
        write_json(saved, [row, floor] if noise else [row])
        say(f"{name}: KL {scores['kl_mean']:.4g}, perplexity {scores['perplexity']:.3f}, {seconds:.0f} s")

    plain = "gguf:BF16" if all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(base.params)) else "gguf:F32"
    measure("fp", lambda: base.params, plain, noise=True, method="fp")
    measure(
        "fp, trained equally long", lambda: rest_bf16(trained(config, run, packed, fp, None)), "gguf:BF16", method="fp"
    )
    for fmt, assignment in assignments.items():
        rounded = partial(rtn.quantize, fp.params, assignment)
        learned = partial(trained, config, run, packed, fp, assignment, fmt)
        measure(f"RTN {fmt}", rounded, "gguf:auto", method="RTN", format=fmt)
        measure(f"QAT {fmt}", learned, "gguf:auto", method="QAT", format=fmt)

    table = [row for file in order(run, config) for row in json.loads(file.read_text())]
    tokens = config.train.steps * config.train.batch_size * packed.manifest.seq_len
    shown = [{k: v for k, v in row.items() if k not in ("types", "convention", "tokens", "windows")} for row in table]
    notes = describe(config, base, table[0], tokens, len(train_documents), len(held_out), overlap)
    paths = report.write_report(shown, run.path("report"), f"Quickstart: {config_name(config)}", notes)
    run.summary(rows=table, report=str(paths["report.html"]), tokens_trained=tokens)
    print(report.text_table(shown), flush=True)


def dry_run(config: Config) -> dict[str, Any]:
    """Formats, bits and bytes of every tensor, by format; nothing is computed."""
    shapes = open_model(config.model).config.shapes()
    return {f: [dataclasses.asdict(row) for row in make_plan(config, f).table(shapes)] for f in config.formats}


def config_name(config: Config) -> str:
    return "a byte-level Llama trained here" if config.pretrain else config.model


def make_plan(config: Config, fmt: str) -> Plan:
    return Plan((*(Rule(k, "bf16") for k in config.keep),), fmt)


def read_documents(data: Data) -> list[str]:
    """The text as documents; one long document is cut into pieces, so that a part can be held out."""
    if data.path is not None and data.hub is not None:
        raise InputError(f"--data.path {data.path} and --data.hub {data.hub} (allowed: one of them)")
    if data.path is not None:
        documents = list(corpus.documents(data.path))
    elif data.hub is not None:
        documents = list(itertools.islice(corpus.hub_documents(data.hub), 2000))
    else:
        documents = corpus.python_corpus()
    return documents if len(documents) >= 20 else [p for d in documents for p in corpus.pieces(d, 4000)]


def split(data: Data, base: Model, documents: list[str]) -> tuple[list[str], list[str], int]:
    """Training and evaluation documents without a 13-gram in common, none of which the model was pretrained on (if
    what it was trained on is known), and how many documents that removed."""
    known = Path(base.source) / HASHES
    seen: set[int] = set()
    if known.is_file():
        hashes = contamination.Contamination.load(known)
        seen = set(hashes.overlap(documents))
        documents = [d for i, d in enumerate(documents) if i not in seen]
        hashes.assert_disjoint(documents, "quickstart text")
    parts = contamination.split(documents, data.held_out)
    contamination.Contamination.of(parts.train).assert_disjoint(parts.held_out)
    return parts.train, sorted(parts.held_out, key=contamination.document_hash), len(seen)


def first_tokens(model: Model, documents: list[str], count: int) -> list[str]:
    """The first documents, the last one cut, that hold about `count` tokens."""
    out, total = [], 0
    for document in documents:
        ids = model.tokenizer.encode(document, bos=False)
        if total + len(ids) > count:
            part = document[: int(len(document) * (count - total) / len(ids))]
            return [*out, part] if part.strip() else out
        out, total = [*out, document], total + len(ids)
    return out


def trained(
    config: Config, run: Run, packed: rows.Rows, fp: Model, assignment: dict[str, Any] | None, fmt: str = "fp"
) -> Tree:
    """Parameters of `fp` after training: with `assignment` by recipe ste and KL to `fp`, without by cross-entropy."""
    part = run.sub(f"train-{fmt.replace(':', '-')}")
    low = assignment is not None and max(bits(f) for f in assignment.values()) <= 3
    settings = dataclasses.replace(
        config.train, lr=config.lr if low else config.lr_high, loss="ce" if assignment is None else config.train.loss
    )
    recipe = qat.get("ste")
    params = fp.params if assignment is None else recipe.prepare(fp.params, assignment)
    with Progress(f"train {fmt}", settings.steps, settings.log_every) as progress:

        def on_metrics(m: dict[str, Any]) -> None:
            part.log(**m)
            progress.update(m["step"], loss=m["loss"], tokens_per_second=round(m["tokens_per_second"]))

        def on_resume(step: int) -> None:
            part.rewind(step)
            progress.resume(step)

        result = train(
            params,
            lambda step: packed.batch(step, settings.batch_size, settings.seed),
            language(fp.config, settings, fp.config),
            settings,
            teacher=None if settings.loss == "ce" else fp.params,
            directory=part.path("checkpoints"),
            resume=run.resumed,
            fingerprint={"rows": dataclasses.asdict(packed.manifest)},
            on_metrics=on_metrics,
            on_resume=on_resume,
        )
    if result.status == "stopped":
        raise KeyboardInterrupt
    return recipe.convert(result.params)


def bits(fmt: Any) -> float:
    """Bits per weight of a format, on a matrix that every group size divides."""
    return fmt.encode(jnp.zeros((1, 7680), jnp.float32)).bits_per_weight


def rest_bf16(params: Tree) -> Tree:
    """What is not quantized, in bf16 as it is stored; codes and scales as they are."""
    return trees.map_leaves(lambda _, x: x if isinstance(x, QTensor) else x.astype(jnp.bfloat16), params)


def pretrained(config: Config, run: Run, documents: list[str]) -> Model:
    """A byte-level Llama of two layers, trained on a part of the documents that is not used again."""
    out = run.path("pretrained")
    parts = contamination.split(documents, 0.5)
    if (out / "config.json").exists():
        documents[:] = parts.held_out
        return load_hf(out)
    tokenizer = ByteTokenizer()
    model = ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position=config.seq,
        tied=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tuple(tokenizer.eos_ids),
    )
    packed = rows.prepare(parts.train, tokenizer, config.seq, run.path("pretraining_rows"))
    settings = dataclasses.replace(
        config.train, steps=config.pretrain_steps, loss="ce", optimizer="muon", lr=5e-3, schedule="wsd", decay=0.5
    )
    part = run.sub("pretrain")
    with Progress("pretrain", settings.steps) as progress:
        result = train(
            init_params(model, jax.random.key(settings.seed)),
            lambda step: packed.batch(step, settings.batch_size, settings.seed),
            language(model, settings),
            settings,
            directory=part.path("checkpoints"),
            resume=run.resumed,
            on_metrics=lambda m: (part.log(**m), progress.update(m["step"], loss=m["loss"])),
            on_resume=part.rewind,
        )
    if result.status == "stopped":
        raise KeyboardInterrupt
    contamination.Contamination.of(parts.train).save(out.with_name(HASHES))
    save_hf(Model(model, result.params, tokenizer), out)
    documents[:] = parts.held_out
    return load_hf(out)


def order(run: Run, config: Config) -> list[Path]:
    """The measured rows, as they stand in the table."""
    names = ["fp", "fp-trained-equally-long"]
    for fmt in config.formats:
        names += [f"{m}-{re.sub(r'[^a-z0-9_]+', '-', fmt)}" for m in ("rtn", "qat")]
    return [run.path("measured", f"{n}.json") for n in names]


def describe(
    config: Config, base: Model, fp: dict[str, Any], tokens: int, train_count: int, eval_count: int, overlap: int
) -> str:
    """The text above the table."""
    rules = [f"`{k}` stays bf16" for k in config.keep] + ["every other linear inside blocks gets the row's format"]
    source = config.data.path or config.data.hub or "the text of this Python installation"
    return "\n\n".join(
        [
            f"Text: {source}; {train_count} documents trained on, {eval_count} held out, {overlap} left out because the"
            f" model was pretrained on a part of them; {fp['tokens']} tokens evaluated, convention {fp['convention']},"
            f" reference the fp model in float32.",
            f"Each trained row: {tokens} tokens. QAT by straight-through estimation, forward KL to the fp model.",
            f"Rules, first match wins: {'; '.join(rules)}. Embeddings, head and norms stay bf16.",
            "Every row was exported to GGUF, read back, and measured from the file.",
        ]
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

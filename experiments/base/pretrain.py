"""lowbit-base: an 8M-parameter Llama whose every width is a multiple of 256.

Purpose: the package's default model. Small pretrained models have widths that K-quants and ternary GGUF types cannot
    hold; this one can be quantized to every format and trained on two CPU cores. Its training text is known: quickstart
    asserts that none of its evaluation text was in it.
Command: lowbit run experiments/base/pretrain.py --texts MOBYDICK.txt TINYSHAKESPEARE.txt --out runs/base
Device: 2 CPU cores (any accelerator works)
Expected time: 85 minutes on 2 CPU cores shared with other work
Expected numbers: 3.8 nats per token on the held-out text
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowbit.data import contamination, corpus
from lowbit.data.tokenizer import train_bpe
from lowbit.errors import Stopped
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import Run
from lowbit.files import write_bytes, write_text
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.tree import Tree


@dataclasses.dataclass(frozen=True)
class Config:
    """`texts` are public-domain text files added to the text of the running Python's standard library."""

    texts: tuple[str, ...] = ()
    held_out: float = 0.15
    keep_every: int = 32  # one in so many 13-grams is kept as training fingerprint
    seq_len: int = 512
    train: TrainConfig = TrainConfig(
        steps=700,
        batch_size=8,
        optimizer="muon",
        lr=5e-3,
        b1=0.95,
        schedule="wsd",
        warmup=30,
        decay=0.5,
        lr_end=0.02,
        weight_decay=0.02,
        log_every=10,
        save_every=100,
        keep=1,
    )


MODEL = ModelConfig(
    family="llama",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=768,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=512,
    tied=True,
    bos_token_id=0,
    eos_token_ids=(0,),
)


def run(config: Config, run: Run) -> None:
    python = corpus.python_corpus()
    split = contamination.split(python, config.held_out, keep_every=config.keep_every)
    prose = [d for path in config.texts for d in corpus.documents(path)]
    documents = split.train + [part for d in prose for part in corpus.pieces(d, 8000)]
    tokenizer = train_bpe(documents, MODEL.vocab_size, ("<|endoftext|>",))
    fingerprint = contamination.Contamination.of(documents, config.keep_every)

    order = np.random.default_rng(0).permutation(len(documents))
    stream = np.fromiter((t for i in order for t in tokenizer.encode(documents[i], bos=True)), np.int32)
    T = config.seq_len
    rows = stream[: len(stream) // T * T].reshape(-1, T)
    held = np.fromiter((t for d in split.held_out for t in tokenizer.encode(d, bos=True)), np.int32)
    held = held[: len(held) // T * T].reshape(-1, T)[:: max(1, len(held) // T // 40)]
    run.summary(
        documents=len(documents), tokens=len(stream), held_out_documents=len(split.held_out), dropped=len(split.dropped)
    )

    B = config.train.batch_size

    def batch(step: int) -> dict[str, np.ndarray]:
        per_epoch = len(rows) // B
        epoch, at = divmod(step, per_epoch)
        perm = np.random.default_rng((config.train.seed, epoch)).permutation(len(rows))
        return {"tokens": rows[perm[at * B : (at + 1) * B]]}

    objective = language(MODEL, config.train)
    score = jax.jit(lambda p, t: objective(p, None, {"tokens": t}))
    done = 0

    def held_out(params: Tree) -> float:
        sums = [[float(x) for x in score(params, held[i : i + 8])] for i in range(0, len(held) // 8 * 8, 8)]
        loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
        run.log(done, held_out_loss=loss)
        return loss

    with Progress("pretrain", config.train.steps, config.train.log_every) as progress:

        def on_metrics(m: dict[str, float]) -> None:
            nonlocal done
            done = int(m["step"])
            run.log(**m)
            progress.update(done, loss=m["loss"], tokens_per_second=round(m["tokens_per_second"]))

        result = train(
            init_params(MODEL, jax.random.key(config.train.seed)),
            batch,
            objective,
            config.train,
            directory=run.path("checkpoints"),
            resume=run.resumed,
            on_metrics=on_metrics,
            on_resume=run.rewind,
            evaluate=held_out,
        )
    if result.status == "stopped":
        raise Stopped(result.message)
    out = run.path("model")
    done = result.step
    loss = held_out(result.params)
    if not out.exists():
        save_hf(Model(MODEL, result.params, tokenizer), out, dtype="bfloat16")
    fingerprint.save(out / "training_hashes.npz")
    write_bytes(out / "loss.png", curve(run.metrics()))
    tokens = config.train.steps * B * T
    write_text(out / "README.md", card(command(config), tokens, len(stream), len(documents), loss))
    run.summary(step=result.step, tokens=tokens, held_out_nats_per_token=loss, parameters=MODEL.num_params)


def curve(metrics: list[dict[str, Any]]) -> bytes:
    """Training and held-out loss over tokens, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    per_step = next(m["tokens"] for m in metrics if "tokens" in m) / 1e6
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(m["step"] * per_step, m[key]) for m in metrics if key in m]
        axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="million tokens", ylabel="nats per token", title="lowbit-base pretraining")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def command(config: Config) -> str:
    """The command that gives this config; of its texts the file names only, folders differ between machines."""
    default = Config()
    words = ["lowbit run experiments/base/pretrain.py --texts", *(Path(t).name for t in config.texts)]
    for name in ("held_out", "keep_every", "seq_len"):
        if getattr(config, name) != getattr(default, name):
            words.append(f"--{name.replace('_', '-')} {getattr(config, name)}")
    for field in dataclasses.fields(TrainConfig):
        if getattr(config.train, field.name) != getattr(default.train, field.name):
            words.append(f"--train.{field.name.replace('_', '-')} {getattr(config.train, field.name)}")
    return " ".join([*words, "--out runs/base"])


def card(command: str, tokens: int, stream: int, documents: int, loss: float) -> str:
    """The model card."""
    return f"""---
license: apache-2.0
language: en
library_name: lowbit
pipeline_tag: text-generation
---

# lowbit-base

A Llama of {MODEL.num_params:,} parameters for testing quantization: {MODEL.num_layers} layers, hidden size
{MODEL.hidden_size}, MLP {MODEL.intermediate_size}, {MODEL.num_heads} heads over {MODEL.num_kv_heads} key-value heads,
byte-level BPE of {MODEL.vocab_size} tokens, tied embedding, context {MODEL.max_position}. Every width is a multiple of
256, so K-quants and ternary GGUF types can hold it. It writes Python-like and English-like text and knows nothing.

- Training text: the CPython standard library (source code without tests, docstrings, `pydoc` topics), *Moby-Dick* and
  Shakespeare (both public domain): {documents:,} documents, {stream:,} tokens.
- Trained on {tokens:,} tokens. Loss on held-out standard-library text: **{loss:.3f} nats per token**.
- `training_hashes.npz` holds the normalised-content hashes of all training documents and a sample of their 13-grams;
  evaluation text is checked against it.
- Command: `{command}`

![loss](loss.png)
"""

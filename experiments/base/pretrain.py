"""lowbit-base: an 8M-parameter Llama whose every width is a multiple of 256.

Purpose: the package's default model. Small pretrained models have widths that K-quants and ternary GGUF types cannot
    hold; this one can be quantized to every format and trained on two CPU cores. Its training text is known: quickstart
    asserts that none of its evaluation text was in it.
Command: lowbit run experiments/base/pretrain.py --texts MOBYDICK.txt TINYSHAKESPEARE.txt --out runs/base
Device: 2 CPU cores (any accelerator works)
Expected time: 90 minutes on 2 CPU cores
Expected numbers: 3.0 nats per token on the held-out text
"""

import dataclasses
import json

import jax
import numpy as np

from lowbit.data import contamination, corpus
from lowbit.data.tokenizer import train_bpe
from lowbit.experiment.run import Run
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language


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
    contamination.Contamination.of(documents, config.keep_every).save(run.path("training_hashes.npz"))

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
    evaluate = jax.jit(lambda p, t: objective(p, None, {"tokens": t}))

    def held_out_loss(params) -> float:
        total = count = 0.0
        for i in range(0, len(held) // 8 * 8, 8):
            s, n = evaluate(params, held[i : i + 8])
            total, count = total + float(s), count + float(n)
        print(f"held-out {total / count:.4f} nats per token", flush=True)
        return total / count

    result = train(
        init_params(MODEL, jax.random.key(config.train.seed)),
        batch,
        objective,
        config.train,
        directory=run.path("checkpoints"),
        resume=run.resumed,
        on_metrics=lambda m: (
            run.log(**{k: v for k, v in m.items() if k != "step"}, step=m["step"]),
            print(json.dumps(m), flush=True),
        ),
        on_resume=run.rewind,
        evaluate=held_out_loss,
    )
    model = Model(MODEL, result.params, tokenizer)
    save_hf(model, run.path("model"), dtype="bfloat16")
    run.summary(status=result.status, step=result.step, held_out_nats_per_token=held_out_loss(result.params))

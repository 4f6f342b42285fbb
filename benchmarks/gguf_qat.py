"""QAT on llama.cpp's own blocks against llama.cpp's quantizer: same model, same bytes, both measured by llama.cpp.

lowbit-base goes to GGUF in F32; llama.cpp's `llama_model_quantize` makes Q4_0, Q2_K and TQ2_0 of it (every linear in
blocks in the same type, embeddings and output as they are; no importance matrix: the Python binding cannot pass one).
Ours: recipe ste-learned on the same grids, forward KL to the model, on the prose and code of this Python installation;
the trained codes and scales are written, never re-quantized. llama.cpp then evaluates both files and the F32 one on
text that neither training nor the base model saw, in rows of 256 tokens from BOS: KL of the file to the F32 file.
`rtn` is our rounding to nearest (for K types a search) of the same model.

    python benchmarks/gguf_qat.py [--quick] [--json] [--steps 160] [--types Q2_K ...]

Needs llama-cpp-python (requirements-runtimes.txt). `--json` prints one object last: for each type `llamacpp`, `rtn`,
`qat` (nats per token), `ratio` (qat / llamacpp), `bytes` of the three files.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np

from lowbit import qat
from lowbit.data import rows as data_rows
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.gguf import write_gguf
from lowbit.export.open import open_model
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.ptq import rtn
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

# type: (what training starts from, peak learning rate)
TYPES = {"Q4_0": ("q4_0:mse:lsq", 1e-4), "Q2_K": ("q2_k:lsq", 5e-4), "TQ2_0": ("tq2_0:mse:lsq", 5e-4)}
LENGTH = 256


def log_probabilities(path: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """llama.cpp's log-probabilities `[B, T, V]`, each row from an empty context."""
    lm = llama_cpp.Llama(str(path), logits_all=True, n_ctx=LENGTH, n_threads=2, verbose=False)
    out = []
    for row in tokens_BT:
        lm.reset()
        lm.eval(row.tolist())
        logits = np.array(lm.scores[: len(row)], np.float64)
        top = logits.max(-1, keepdims=True)
        out.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return np.stack(out)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def by_llamacpp(source: Path, target: Path, type: str) -> None:
    """llama.cpp's own file; embeddings and output stay float, so that only the linears inside blocks differ."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + type)
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_F32
    params.pure, params.nthread = True, 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {type}")


def learned(fp: Model, packed: data_rows.Rows, fmt: str, lr: float, steps: int) -> Model:
    """The model after QAT on the blocks of a type."""
    recipe = qat.get("ste-learned")
    settings = TrainConfig(steps=steps, batch_size=2, lr=lr, loss="kl", warmup=2, scale_lr=1.0, log_every=steps)
    assignment = Plan.uniform(fmt).resolve(fp.config.shapes())
    done = train(
        recipe.prepare(fp.params, assignment),
        lambda step: packed.batch(step, settings.batch_size, settings.seed),
        language(fp.config, settings, fp.config),
        settings,
        teacher=fp.params,
    )
    return fp.replace(params=recipe.convert(done.params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 steps, 4 rows of evaluation")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    args = parser.parse_args()
    steps, count = (16, 4) if args.quick else (args.steps, 32)
    model = open_model("lowbit-base")
    fp = model.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params))
    data = Data(eval_tokens=count * LENGTH)
    documents, held_out, _ = split(data, model, read_documents(data))
    ids = [i for d in first_tokens(fp, held_out, 2 * count * LENGTH) for i in fp.tokenizer.encode(d, bos=False)]
    tokens_BT = np.asarray(ids[: count * (LENGTH - 1)]).reshape(count, LENGTH - 1)
    tokens_BT = np.concatenate([np.full((count, 1), fp.tokenizer.bos_id), tokens_BT], axis=1)
    result: dict[str, Any] = {"steps": steps, "tokens_trained": steps * 2 * LENGTH, "tokens": int(tokens_BT.size)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = data_rows.prepare(documents, fp.tokenizer, LENGTH, folder / "rows")
        write_gguf(fp, folder / "fp.gguf", "F32")
        goal = log_probabilities(folder / "fp.gguf", tokens_BT)
        for type in args.types:
            fmt, lr = TYPES[type]
            start = time.monotonic()
            assignment = Plan.uniform(type.lower()).resolve(fp.config.shapes())
            by_llamacpp(folder / "fp.gguf", folder / "llamacpp.gguf", type)
            write_gguf(fp.replace(params=rtn.quantize(fp.params, assignment)), folder / "rtn.gguf", type)
            write_gguf(learned(fp, packed, fmt, lr, steps), folder / "qat.gguf", type)
            found: dict[str, Any] = {}
            for what in ("llamacpp", "rtn", "qat"):
                found[what] = kl(goal, log_probabilities(folder / f"{what}.gguf", tokens_BT))
            found |= {"ratio": found["qat"] / found["llamacpp"], "seconds": round(time.monotonic() - start, 1)}
            found["bytes"] = {what: (folder / f"{what}.gguf").stat().st_size for what in ("llamacpp", "rtn", "qat")}
            result[type] = found
            print(
                f"{type}: KL llama.cpp {found['llamacpp']:.4f}, ours rounded {found['rtn']:.4f}, trained "
                f"{found['qat']:.4f} ({found['ratio']:.3f} of llama.cpp's)",
                flush=True,
            )
    versions = {p: importlib.metadata.version(p) for p in ("jax", "llama-cpp-python", "numpy")}
    result |= {"versions": versions, "python": platform.python_version(), "platform": platform.platform()}
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

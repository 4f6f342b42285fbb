"""QAT side by side: ours, google qwix, and torchao, from the same checkpoint, on the same tokens in the same order.

lowbit-base, weights only, the linears inside blocks: int4 in groups of 64 and int8 in groups of 64 against qwix (`ste`:
the same kind of recipe; `learned`: our `ste-learned`), int4 in groups of 32 against torchao on the same weights in
transformers. All minimise forward KL to the unquantized model by AdamW at a constant rate, without weight decay, on
rows of 256 tokens of this Python's prose and code; `kl` is that of held-out rows, quantized, nats per token.
`tokens_per_second` counts whole steps after the first.

    python benchmarks/qat_peers.py [--quick] [--json] [--steps 100] [--peer-python PYTHON] [--require-peer]

qwix runs in this environment, torchao in one that `--peer-python` names (absent: null; `--require-peer` then fails):

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install transformers==5.23.0 torchao

`--json` prints one object last: `{"qwix": {format: {"ste", "learned", "qwix", "rtn"}}, "torchao": {...}}`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla.flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from qat_step import CONFIG, Model

from lowbit import qat
from lowbit.data import rows as data_rows
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.open import open_model
from lowbit.models.decoder import forward
from lowbit.models.hf import save_hf
from lowbit.plan import Plan
from lowbit.train.objective import forward_kl

LENGTH, BATCH = 256, 4
# (what qwix calls it, our formats for ste and ste-learned, learning rate: 8 bits have little to win)
QWIX = {
    "int4 g64": ("int4", "int4:g64", "int4:g64:signmse:lsq", 1e-4),
    "int8 g64": ("int8", "int8:g64", "int8:g64:mse:lsq", 1e-6),
}
TORCHAO = ("int4:g32", "int4:g32:signmse:lsq")


def run(logits: Any, params: Any, fp: Any, tokens: np.ndarray, held_out: np.ndarray, lr: float) -> dict[str, float]:
    """Trains `params` of `logits(params, tokens)`; KL before and after, tokens per second."""
    optimizer = optax.adamw(lr, b2=0.95, weight_decay=0.0)

    def divergence(params: Any, tokens: jax.Array) -> jax.Array:
        goal = jax.lax.stop_gradient(forward(fp, tokens, CONFIG))
        return jnp.mean(forward_kl(goal, logits(params, tokens)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(divergence)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    measure = jax.jit(divergence)
    params = jax.tree.map(jnp.copy, params)
    before = float(np.mean([measure(params, held_out[i : i + 8]) for i in range(0, len(held_out), 8)]))
    state, seconds = optimizer.init(params), 0.0
    for i, batch in enumerate(tokens):
        start = time.perf_counter()
        params, state, loss = step(params, state, batch)
        jax.block_until_ready(loss)
        seconds += time.perf_counter() - start if i else 0.0
    after = float(np.mean([measure(params, held_out[i : i + 8]) for i in range(0, len(held_out), 8)]))
    rate = (len(tokens) - 1) * tokens[0].size / seconds
    return {"rtn": round(before, 5), "kl": round(after, 5), "tokens_per_second": round(rate)}


def ours(recipe: str, fmt: str, fp: Any, *args: Any) -> dict[str, float]:
    tree = qat.get(recipe).prepare(fp, Plan.uniform(fmt).resolve(CONFIG.shapes()))
    return run(lambda p, t: forward(p, t, CONFIG), tree, fp, *args)


def by_qwix(dtype: str, fp: Any, tokens: np.ndarray, *args: Any) -> dict[str, float]:
    import qwix

    rule = qwix.QtRule(module_path="blocks", op_names=("dot_general",), weight_qtype=dtype, tile_size=64)
    model = qwix.quantize_model(Model(fp), qwix.QtProvider([rule]), jnp.asarray(tokens[0]))
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    return run(lambda w, t: nnx.merge(graph, w, rest)(t), weights, fp, tokens, *args)


def by_torchao(python: str, model: Any, tokens: np.ndarray, held_out: np.ndarray, lr: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        save_hf(model, Path(name) / "model", dtype="float32")
        np.savez(Path(name) / "tokens.npz", tokens=tokens, held_out=held_out)
        script = Path(__file__).with_name("qat_torchao_peer.py")
        out = subprocess.run([python, str(script), name, str(lr)], capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"torchao in {python}: {out.stderr.strip().splitlines()[-1:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 steps, int4 alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peer-python")
    parser.add_argument("--require-peer", action="store_true")
    args = parser.parse_args()
    if args.require_peer and not args.peer_python:
        sys.exit("--require-peer without --peer-python (allowed: the Python of an environment with torchao)")
    steps = 8 if args.quick else args.steps
    model = open_model("lowbit-base")
    fp = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params)
    data = Data(eval_tokens=32 * LENGTH)
    documents, rest, _ = split(data, model, read_documents(data))
    with tempfile.TemporaryDirectory() as name:
        packed = data_rows.prepare(documents, model.tokenizer, LENGTH, Path(name))
        tokens = np.stack([np.asarray(packed.batch(i, BATCH, 0)["tokens"])[:, :LENGTH] for i in range(steps)])
    ids = [i for d in first_tokens(model, rest, 32 * LENGTH) for i in model.tokenizer.encode(d, bos=False)]
    held_out = np.asarray(ids[: len(ids) // LENGTH // 8 * 8 * LENGTH], np.int32).reshape(-1, LENGTH)
    shared = (tokens, held_out, QWIX["int4 g64"][-1])
    result: dict[str, Any] = {"steps": steps, "tokens": int(tokens.size), "held_out": int(held_out.size), "qwix": {}}
    for what, (dtype, fitted, learned, lr) in list(QWIX.items())[: 1 if args.quick else None]:
        same = (tokens, held_out, lr)
        result["qwix"][what] = {
            "ste": ours("ste", fitted, fp, *same),
            "learned": ours("ste-learned", learned, fp, *same),
            "qwix": by_qwix(dtype, fp, *same),
        }
    result["torchao"] = None
    if args.peer_python:
        result["torchao"] = {
            "ste": ours("ste", TORCHAO[0], fp, *shared),
            "learned": ours("ste-learned", TORCHAO[1], fp, *shared),
            "torchao": by_torchao(args.peer_python, model.replace(params=fp), *shared),
        }
    tables = {**result["qwix"], **({"torchao int4 g32": result["torchao"]} if result["torchao"] else {})}
    for what, table in tables.items():
        for name, row in table.items():
            shown = f"KL {row['rtn']:.5f} -> {row['kl']:.5f}   {row['tokens_per_second']:6d} tokens/s"
            print(f"{what:18s} {name:8s} {shown}", flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "qwix", "optax")}
    result |= {"versions": versions, "python": platform.python_version()}
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

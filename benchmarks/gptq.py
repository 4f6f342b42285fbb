"""GPTQ of single weights against GPTQModel (torch, on the CPU) and qwix: quadratic error and wall time.

Weights of lowbit-base with the inputs that its calibration gives (8192 tokens of the running Python's documentation),
and a synthetic 1024 x 4096 one with correlated inputs of uneven size; symmetric, groups of 128, int4 and int3, damping
0.01. All get the same weights and the same inputs; the clock runs from the Hessian to the quantized weight, compilation
apart; rounds of ours and the peer's alternate and the minimum counts. Errors are `tr((W - W_hat) H (W - W_hat)^T)` in
float64, with our H. Three comparisons with GPTQModel: `gptqmodel`, both with columns as they are; `same_grid`, the same
with its scale rule (`max|w| / (2^(b-1) - 1/2)` in float32) instead of ours, which leaves the solvers alone to differ;
`act`, our default order of columns against its default (act-group-aware).

GPTQModel needs its own environment, whose Python `--peer-python` names:

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install --no-deps gptqmodel==7.7.0
    peer/bin/pip install transformers==5.23.0 accelerate threadpoolctl device-smi protobuf pillow requests logbar \
        tokenicer pypcre defuser dill datasets torchao
    python benchmarks/gptq.py --peer-python peer/bin/python [--require-peer] [--quick] [--json]

`--json` prints one object last: for each weight and format `error` (ours, RTN's), `seconds`, and per peer `error_ratio`
and `time_ratio`, ours over theirs (below 1: ours is better); `worst` has the largest of them. Without the peer, null.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.data.corpus import python_corpus
from lowbit.export.open import find_folder
from lowbit.formats import base as formats
from lowbit.formats.integer import Integer
from lowbit.models.decoder import block, embed
from lowbit.models.hf import load_hf
from lowbit.ptq import rtn
from lowbit.ptq.calibrate import linears, tokenize
from lowbit.ptq.gptq import gptq, quadratic_error

GROUP, DAMPING = 128, 0.01
LINEARS = ("q_proj", "gate_proj", "down_proj")
LAYER = 1


def base_problems() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{name: (weight [O, I], inputs [N, I])}` of one layer of lowbit-base."""
    model = load_hf(find_folder("lowbit-base"))
    tokens = jnp.asarray(tokenize(python_corpus(["prose"]), model.tokenizer, 16, 512))
    step, x = jax.jit(block, static_argnums=0), embed(model.params, tokens, model.config, jnp.float32)
    for i in range(LAYER + 1):
        layer = model.params["model"]["layers"][str(i)]
        x, inputs = step(model.config, layer, x, jnp.asarray(i))
    paths = linears(model.config)
    return {
        f"base.{n}": (
            np.asarray(trees.get(layer, paths[n]), np.float32),
            np.asarray(inputs[n]).reshape(-1, inputs[n].shape[-1]),
        )
        for n in LINEARS
    }


def synthetic_problem() -> tuple[np.ndarray, np.ndarray]:
    """A 1024 x 4096 weight and 8192 inputs with 256 strong directions and channels of uneven size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8192, 256)) @ rng.standard_normal((256, 4096)) / 16
    x = (x + 0.3 * rng.standard_normal((8192, 4096))) * np.exp(0.5 * rng.standard_normal(4096))
    return (0.02 * rng.standard_normal((1024, 4096))).astype(np.float32), x.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TheirGrid(Integer):
    """GPTQModel's symmetric integers, not rounded to fp16."""

    def fit(self, w_OGK: jax.Array) -> dict[str, jax.Array]:
        return {"scale": self.reduce(jnp.maximum, jnp.abs(w_OGK)) / (2 ** (self.width - 1) - 0.5)}


class Peer:
    """`benchmarks/gptq_peer.py` under another Python, answering one line at a time."""

    def __init__(self, python: str, folder: Path):
        self.folder = folder
        command = [python, str(Path(__file__).with_name("gptq_peer.py")), str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, cwd=folder, **pipes)
        self.versions = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"peer ended with exit code {self.process.wait()}")

    def solve(self, name: str, bits: int, mode: str) -> tuple[float, np.ndarray]:
        """Seconds and the quantized weight."""
        self.process.stdin.write(f"{name} {bits} {GROUP} {mode}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"], np.load(self.folder / "peer.npy")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def qwix_solve(w: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
    """qwix's GPTQ at int4, from its Hessian on; operation by operation, as its own code calls it."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=[0], tiled_axes={1: GROUP})
    W, H = jnp.asarray(w), gptq_core.compute_hessian(jnp.asarray(x).T)
    jax.block_until_ready(H)
    start = time.perf_counter()
    q = gptq_core.quantize_weight(W, H, how, percdamp=DAMPING)[0]
    w_hat = jax.block_until_ready(qarray.dequantize(q))
    return time.perf_counter() - start, np.asarray(w_hat, np.float32)


def ours(w: np.ndarray, h: jax.Array, fmt: formats.Format, act_order: bool) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    w_hat = jax.block_until_ready(gptq(w, h, fmt, damping=DAMPING, act_order=act_order).w_hat_OI)
    return time.perf_counter() - start, np.asarray(w_hat)


def measure(name: str, w: np.ndarray, x: np.ndarray, bits: int, peer: Peer | None, rounds: int) -> dict[str, Any]:
    """One weight in one format, everyone in turn."""
    fmt, h = formats.get(f"int{bits}:g{GROUP}"), 2 / len(x) * x.T.astype(np.float64) @ x.astype(np.float64)
    H = jnp.asarray(h, jnp.float32)
    theirs = TheirGrid(width=bits, granularity=GROUP, storage="f32")
    runs = {
        "ours": lambda: ours(w, H, fmt, False),
        "ours_act": lambda: ours(w, H, fmt, True),
        "ours_their_grid": lambda: ours(w, H, theirs, False),
    }
    if peer is not None:
        runs["gptqmodel"] = lambda: peer.solve(name, bits, "plain")
        runs["gptqmodel_default"] = lambda: peer.solve(name, bits, "default")
    for run in runs.values():
        run()  # compiles ours, warms theirs
    seconds, error = dict.fromkeys(runs, float("inf")), {}
    for _ in range(rounds):
        for key, run in runs.items():
            time.sleep(0.3)  # until the threads of the one before have stopped spinning
            took, w_hat = run()
            seconds[key], error[key] = min(seconds[key], took), quadratic_error(w, w_hat, h)
    if bits == 4 and w.size < 1 << 20:  # minutes on the large one
        qwix_solve(w, x)
        seconds["qwix"], w_hat = qwix_solve(w, x)
        error["qwix"] = quadratic_error(w, w_hat, h)
    error["rtn"] = quadratic_error(w, rtn.encode(fmt, w).decode(), h)
    out: dict[str, Any] = {"error": error, "seconds": {k: round(s, 4) for k, s in seconds.items()}, "gptqmodel": None}
    pairs = {
        "gptqmodel": ("ours", "gptqmodel"),
        "same_grid": ("ours_their_grid", "gptqmodel"),
        "act": ("ours_act", "gptqmodel_default"),
        "qwix": ("ours", "qwix"),
    }
    for key, (a, b) in pairs.items():
        if b in seconds:
            ratios = {"error_ratio": error[a] / error[b], "time_ratio": seconds[a] / seconds[b]}
            out[key] = {k: round(v, 4) for k, v in ratios.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="Python of an environment with gptqmodel")
    parser.add_argument("--require-peer", action="store_true", help="fail without it")
    parser.add_argument("--quick", action="store_true", help="weights of lowbit-base alone, 2 rounds instead of 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.require_peer and not args.peer_python:
        sys.exit("--require-peer without --peer-python")
    problems = base_problems() | ({} if args.quick else {"synthetic": synthetic_problem()})
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name, (w, x) in problems.items():
            np.savez(Path(tmp) / f"{name}.npz", w=w, x=x)
        peer = Peer(args.peer_python, Path(tmp)) if args.peer_python else None
        for name, (w, x) in problems.items():
            for bits in (4, 3):
                key = f"{name} {w.shape[0]}x{w.shape[1]} int{bits}:g{GROUP}"
                out[key] = r = measure(name, w, x, bits, peer, 2 if args.quick else 5)
                print(f"{key}: {json.dumps({k: v for k, v in r.items() if k != 'error'})}", flush=True)
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "numpy", "qwix")}
        if peer is not None:
            versions |= peer.versions
            peer.close()
    worst = {}
    for who in ("gptqmodel", "same_grid", "act", "qwix"):
        found = [r[who] for r in out.values() if r.get(who)]
        worst[who] = {k: max(f[k] for f in found) for k in ("error_ratio", "time_ratio")} if found else None
    out |= {
        "worst": worst,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
    }
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()

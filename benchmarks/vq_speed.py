"""Speed of vector quantizers against the reference's own code, on the same machine and the same input.

Viterbi: tiles of 256 normal weights, tail-biting (two passes), L = 16, 3INST at V = 1 and 2 bits, against QTIP's
PyTorch code (`lib/codebook/bitshift.py`, its `quantize`, compiled by torch as it ships) on the CPU. A sample of tiles
is timed and a 4096 x 4096 matrix (65536 tiles) extrapolated. CPU and wall seconds; compilation apart.

    git clone https://github.com/Cornell-RelaxML/qtip DIR
    python benchmarks/vq_speed.py --peer-path DIR [--peer-python PYTHON] [--require-peer] [--tiles N] [--json]

`--peer-python` is a Python that has torch, numpy and tqdm (default: this one). `--json` prints one object last, in
which `viterbi` has `ours`, `peer` (null without one) and `ratio`, theirs over ours in CPU time; the peer's commit is
recorded.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MATRIX = 4096 * 4096 // 256  # tiles

PEER = """
import importlib, json, sys, time, types
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
# What the codebook's file imports besides and the search does not use: CUDA kernels.
for name in ("codebook", "utils", "utils.kernel_check", "utils.kernel_decompress", "utils.matmul_had"):
    sys.modules["lib." + name] = types.ModuleType("lib." + name)
sys.modules["lib.codebook"].__path__, sys.modules["lib.codebook"].kdict = [sys.argv[1] + "/lib/codebook"], {}
sys.modules["lib.utils.kernel_check"].has_kernel = lambda *a: False
sys.modules["lib.utils.kernel_decompress"].decode_compressed = None
sys.modules["lib.utils.matmul_had"].matmul_hadU_cuda = sys.modules["lib.utils.matmul_had"].matmul_hadUt_cuda = None
if sys.argv[3] == "eager":
    torch.compile = lambda f: f
torch.set_num_threads(2)
book = importlib.import_module("lib.codebook.bitshift").bitshift_codebook(L=16, K=2, V=1, decode_mode="3inst")
x = torch.tensor(np.load(sys.argv[2]))
seconds = []
for _ in range(2):  # the first compiles
    cpu, wall = time.process_time(), time.perf_counter()
    hat, _ = book.quantize(x)
    seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
cpu, wall = min(seconds)
error = float(((hat.float() - x) ** 2).mean() / (x**2).mean())
print("RESULT", json.dumps({"cpu": cpu, "wall": wall, "error": error, "torch": torch.__version__}))
"""


def ours(x_ZT: np.ndarray) -> dict[str, float]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    from lowbit.vq.trellis_codes import table_of
    from lowbit.vq.viterbi import Trellis, tail_biting

    trellis = Trellis(16, (2,))
    table_VS, x = table_of("3inst", trellis), jnp.asarray(x_ZT[..., None])
    seconds = []
    for _ in range(4):
        cpu, wall = time.process_time(), time.perf_counter()
        states = jax.block_until_ready(tail_biting(trellis, table_VS, x))
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = min(seconds[1:])
    error = np.mean((np.asarray(table_VS)[0][np.asarray(states)] - x_ZT) ** 2) / np.mean(x_ZT**2)
    return {"cpu": cpu, "wall": wall, "error": float(error)}


def peer(args: argparse.Namespace, x_ZT: np.ndarray) -> dict[str, Any] | None:
    """None where there is none; the compiled program where torch can compile, else operation by operation."""
    if args.peer_path is None:
        return None
    for how in ("compiled", "eager"):
        with tempfile.TemporaryDirectory() as tmp:
            file = Path(tmp) / "x.npy"
            np.save(file, x_ZT)
            command = [args.peer_python, "-c", PEER, args.peer_path, str(file), how]
            done = subprocess.run(command, capture_output=True, text=True)
        if (at := done.stdout.find("RESULT ")) >= 0:
            git = ["git", "-C", args.peer_path, "rev-parse", "HEAD"]
            commit = args.peer_commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
            return {**json.loads(done.stdout[at + 7 :]), "how": how, "commit": commit}
        print(f"peer, {how}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return None


def viterbi_row(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a tile, and what follows from them."""
    x_ZT = (np.random.default_rng(args.seed).standard_normal((args.tiles, 256)) * 1.2437).astype(np.float32)
    rows: dict[str, Any] = {"tiles": args.tiles, "ours": ours(x_ZT), "peer": peer(args, x_ZT)}
    rows["ours"]["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for who in ("ours", "peer"):
        if (row := rows[who]) is not None:
            row["cpu_ms_per_tile"] = 1e3 * row["cpu"] / args.tiles
            row["cpu_s_per_million_weights"] = row["cpu"] / args.tiles * 1e6 / 256
            row["cpu_s_of_4096x4096_extrapolated"] = row["cpu"] / args.tiles * MATRIX
            print(
                f"viterbi {who:5} {row['cpu_ms_per_tile']:8.2f} ms of CPU a tile, error {row['error']:.5f}, "
                f"{row['cpu_s_per_million_weights']:.0f} s a million weights"
            )
    rows["ratio"] = None if rows["peer"] is None else rows["peer"]["cpu"] / rows["ours"]["cpu"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-path")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-commit", default="", help="of a copy without its history")
    parser.add_argument("--require-peer", action="store_true")
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {"viterbi": viterbi_row(args)}
    if args.json:
        print(json.dumps(rows))
    if args.require_peer and rows["viterbi"]["peer"] is None:
        raise SystemExit("no peer: --peer-path does not name a checkout whose code runs under --peer-python")


if __name__ == "__main__":
    main()

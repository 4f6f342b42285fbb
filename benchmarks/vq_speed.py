"""Speed of vector quantizers against the reference's own code, on the same machine and the same input.

- `viterbi`: tiles of 256 normal weights, tail-biting (two passes), L = 16, 3INST at V = 1 and 2 bits, against QTIP's
  PyTorch code (`lib/codebook/bitshift.py`, its `quantize`, compiled by torch as it ships).
- `aqlm`: one beam search over all codes of normal rows of 4096 weights, inputs correlated, from the same codebooks,
  codes and XtX, groups in the same order, against AQLM's (`src/beam_search_xtx.py`, scripted by torch as it ships). Run
  for each beam of `--beam`; the loss is the squared error of the outputs relative to theirs, in float64 from the codes.

A sample of tiles or rows is timed and a 4096 x 4096 matrix extrapolated. CPU and wall seconds, peers on one thread (two
wait for each other beside other work, which counts as CPU); compilation apart.

    git clone https://github.com/Cornell-RelaxML/qtip QTIP
    git clone https://github.com/Vahe1994/AQLM AQLM
    python benchmarks/vq_speed.py --peer-path QTIP AQLM [--peer-python PYTHON] [--require-peer] [--only ROW ...]
        [--quick] [--tiles N] [--rows N] [--format aqlm:2x8:g8] [--beam 1 8] [--json]

A peer is known by its files. `--peer-python` is a Python that has torch, numpy and tqdm (default: this one). `--json`
prints one object last, in which each row (`viterbi`, `aqlm beam 1`) has `ours`, `peer` (null without one) and `ratio`,
theirs over ours in CPU time; the peer's commit is recorded.
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

WIDTH = 4096
MATRIX = WIDTH * WIDTH
FILES = {"viterbi": "lib/codebook/bitshift.py", "aqlm": "src/beam_search_xtx.py"}  # that a peer is known by

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
torch.set_num_threads(int(sys.argv[4]))
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


def viterbi_ours(x_ZT: np.ndarray) -> dict[str, float]:
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


def found(args: argparse.Namespace, row: str) -> tuple[str, str] | None:
    """`(folder, commit)` of a row's peer, None where there is none."""
    for at, folder in enumerate(args.peer_path):
        if (Path(folder) / FILES[row]).is_file():
            git = ["git", "-C", folder, "rev-parse", "HEAD"]
            given = args.peer_commit[at : at + 1]
            return folder, *(given or [subprocess.run(git, capture_output=True, text=True).stdout.strip()])
    return None


def run(args: argparse.Namespace, what: str, *command: str) -> dict[str, Any] | None:
    """What a peer's program prints behind RESULT; None, and its last line on stderr, where it fails."""
    done = subprocess.run([args.peer_python, *command], capture_output=True, text=True)
    if (at := done.stdout.find("RESULT ")) >= 0:
        return json.loads(done.stdout[at + 7 :])
    print(f"peer, {what}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return None


def viterbi_peer(args: argparse.Namespace, x_ZT: np.ndarray) -> dict[str, Any] | None:
    """None where there is none; the compiled program where torch can compile, else operation by operation."""
    if (at := found(args, "viterbi")) is None:
        return None
    for how in ("compiled", "eager"):
        with tempfile.TemporaryDirectory() as tmp:
            file = Path(tmp) / "x.npy"
            np.save(file, x_ZT)
            row = run(args, f"QTIP, {how}", "-c", PEER, at[0], str(file), how, str(args.peer_threads))
        if row is not None:
            return {**row, "how": how, "threads": args.peer_threads, "commit": at[1]}
    return None


def viterbi_row(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a tile, and what follows from them."""
    x_ZT = (np.random.default_rng(args.seed).standard_normal((args.tiles, 256)) * 1.2437).astype(np.float32)
    row: dict[str, Any] = {"tiles": args.tiles, "ours": viterbi_ours(x_ZT), "peer": viterbi_peer(args, x_ZT)}
    row["ours"]["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return finished("viterbi", row, x_ZT.size, "tile", args.tiles)


def aqlm_input(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Rows, XtX of inputs that are correlated with their neighbours and in 16 directions and vary in size, and
    codebooks and codes found without XtX."""
    import jax
    import jax.numpy as jnp

    from lowbit.formats import base as formats

    fmt = formats.get(args.format)
    rng, at = np.random.default_rng(args.seed), np.arange(WIDTH)
    w = rng.standard_normal((args.rows, WIDTH)).astype(np.float32)
    size, common = np.exp(rng.standard_normal(WIDTH) / 2), rng.standard_normal((WIDTH, 16)) / 4
    XTX = ((0.7 ** np.abs(at[:, None] - at) + common @ common.T) * size[:, None] * size).astype(np.float32)
    params = fmt.stored(jax.jit(fmt.init)(jnp.asarray(w)))
    codes = jax.jit(fmt.quantize)(jnp.asarray(w), params)
    codes_OGM = np.asarray(codes).reshape(args.rows, -1, fmt.number)
    return {"w": w, "XTX": XTX, "codes": codes_OGM, **{k: np.asarray(a) for k, a in params.items()}}


def aqlm_ours(args: argparse.Namespace, given: dict[str, np.ndarray], beam: int) -> tuple[dict[str, Any], np.ndarray]:
    import jax
    import jax.numpy as jnp

    from lowbit.formats import base as formats
    from lowbit.ptq.aqlm import rows_at_once, sweep

    fmt = formats.get(args.format)
    w, H, book, scale = (jnp.asarray(given[k]) for k in ("w", "XTX", "codebook", "scale"))
    codes = jnp.asarray(given["codes"].reshape(len(w), -1))
    order = np.arange(given["codes"].shape[1], dtype=np.int32).reshape(-1, 128 // fmt.size)
    call = fmt, beam, w, H, codes, {"codebook": book, "scale": scale}, order
    memory = sweep.lower(*call).compile().memory_analysis()
    seconds = []
    for _ in range(4):  # the first compiles
        cpu, wall = time.process_time(), time.perf_counter()
        new, _ = jax.block_until_ready(sweep(*call))
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = min(seconds[1:])
    row = {"cpu": cpu, "wall": wall, "rows_at_once": min(len(w), rows_at_once(fmt, beam, WIDTH))}
    return {**row, "temporary_mib": memory.temp_size_in_bytes / 2**20}, np.asarray(new).reshape(given["codes"].shape)


def aqlm_peer(
    args: argparse.Namespace, given: dict[str, np.ndarray], beam: int
) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    if (at := found(args, "aqlm")) is None:
        return None, None
    own = {k: given[k] for k in ("w", "XTX", "codes")}
    own |= {"books": given["codebook"].reshape(-1, 1, *given["codebook"].shape[-2:]).swapaxes(1, 2)}
    own |= {"scales": given["scale"].reshape(-1, 1, 1, 1), "beam": beam, "threads": args.peer_threads}
    with tempfile.TemporaryDirectory() as tmp:
        files = [str(Path(tmp) / f"{k}.npz") for k in ("in", "out")]
        np.savez(files[0], **own)
        row = run(args, "AQLM", str(Path(__file__).with_name("aqlm_peer.py")), at[0], *files)
        return (None, None) if row is None else ({**row, "commit": at[1]}, np.load(files[1])["codes"])


def loss(given: dict[str, np.ndarray], codes_OGM: np.ndarray) -> float:
    """`|X (W - W_hat)^T|^2 / |X W^T|^2`, in float64."""
    books, w = given["codebook"][:, 0].astype(np.float64), given["w"].astype(np.float64)
    y = sum(books[m][codes_OGM[..., m]] for m in range(len(books))).reshape(w.shape)
    d = w - y * given["scale"]
    of = lambda a: float(np.sum((a @ given["XTX"].astype(np.float64)) * a))  # noqa: E731
    return of(d) / of(w)


def aqlm_rows(args: argparse.Namespace) -> dict[str, Any]:
    given, rows = aqlm_input(args), {}
    start = loss(given, given["codes"])
    for beam in args.beam:
        (own, codes), (other, theirs) = aqlm_ours(args, given, beam), aqlm_peer(args, given, beam)
        own["error"] = loss(given, codes)
        if other is not None:
            other |= {"error": loss(given, theirs), "same_codes": float(np.mean(theirs == codes))}
        row = {"rows": args.rows, "format": args.format, "start": start, "ours": own, "peer": other}
        rows[f"aqlm beam {beam}"] = finished(f"aqlm beam {beam}", row, given["w"].size, "row", args.rows)
    return rows


def finished(name: str, row: dict[str, Any], weights: int, unit: str, units: int) -> dict[str, Any]:
    """A row with what follows from its CPU seconds; prints it."""
    for who in ("ours", "peer"):
        if (one := row[who]) is not None:
            one[f"cpu_ms_per_{unit}"] = 1e3 * one["cpu"] / units
            one["cpu_s_per_million_weights"] = one["cpu"] / weights * 1e6
            one["cpu_s_of_4096x4096_extrapolated"] = one["cpu"] / weights * MATRIX
            each, million = one[f"cpu_ms_per_{unit}"], one["cpu_s_per_million_weights"]
            whole = f"{one['cpu_s_of_4096x4096_extrapolated']:.3g} s for 4096 x 4096 (extrapolated)"
            cost = f"{1e3 * one['cpu']:8.0f} ms of CPU, {each:.2f} a {unit}, {million:.3g} s a million weights"
            print(f"{name} {who:5} {cost}, {whole}, error {one['error']:.5f}", flush=True)
    row["ratio"] = None if row["peer"] is None else row["peer"]["cpu"] / row["ours"]["cpu"]
    print(f"{name} ratio {'null: no peer' if row['ratio'] is None else format(row['ratio'], '.3g')}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-path", nargs="+", default=[], help="checkouts of QTIP and AQLM, in any order")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-commit", nargs="+", default=[], help="of copies without their history, in that order")
    parser.add_argument("--peer-threads", type=int, default=1, help="of torch; two burn CPU in waiting")
    parser.add_argument("--require-peer", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--quick", action="store_true", help="16 tiles, 16 rows and a beam of 1, unless given")
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--rows", type=int, help="of 4096 weights")
    parser.add_argument("--format", default="aqlm:2x8:g8")
    parser.add_argument("--beam", type=int, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.tiles = args.tiles or (16 if args.quick else 64)
    args.rows = args.rows or (16 if args.quick else 256)
    args.beam = args.beam or ([1] if args.quick else [1, 8])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows: dict[str, Any] = {}
    if "viterbi" in args.only:
        rows["viterbi"] = viterbi_row(args)
    if "aqlm" in args.only:
        rows |= aqlm_rows(args)
    if args.json:
        print(json.dumps(rows))
    if args.require_peer and (lacking := [name for name, row in rows.items() if row["peer"] is None]):
        which = "no checkout in --peer-path whose code runs under --peer-python"
        raise SystemExit(f"no peer for {', '.join(lacking)}: {which}")


if __name__ == "__main__":
    main()

"""Mean squared error of codes for i.i.d. N(0, 1) at 1 to 4 bits, against the rate-distortion bound 2^-2R.

Each row is relative to the sample's own variance, from fresh draws of `--seed`, encoded by the shipped formats at their
own scales and decoded from the packed bytes. Rows:

- `bound`: 2^-2R; `lloyd_max`: the best scalar quantizer, in closed form;
- `e8p`: `e8p2`, `e8p3`, `e8p4` (2^20 samples), and `e8p_shipped` with the scales that QuIP# ships;
- `trellis`: the best code of one value a step, and `hyb`: QTIP's code for pairs (`trellis_rows.py`).

    python benchmarks/distortion.py [--seed 0] [--quick] [--plot distortion.png] [--json]

`--json` prints one object last, `{"bound": {"1": ...}, "lloyd_max": {...}, "e8p": {"2": ..., "3": ..., "4": ...},
"trellis": {"1": ...}, "hyb": {...}}`, under `codes` all trellis codes, and under `speed` seconds per million weights.
QuIP#'s own nearest point (torch, CPU), on a quarter of the same rows:

    python benchmarks/distortion.py --peer-path quip-sharp --peer-python PYTHON_WITH_TORCH [--require-peer]

Without `--peer-path` its row is null. `--better` adds the list `better`: longer states, tiles and first passes at 2
bits.
"""

import argparse
import json
import os
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
from trellis_rows import better_rows, trellis_rows

from lowbit.formats import base as formats
from lowbit.vq import lattice
from lowbit.vq.lloyd_max import lloyd_max

RATES = (1, 2, 3, 4)
SHIPPED = {2: "e8p2", 3: "e8p3:rho0.98:r2.04", 4: "e8p4:rho1.03:r3.45"}
ROWS: list[Any] = []  # functions of the arguments that return `{row: {rate: error}}`
Row = dict[str, dict[str, float]]


def measured(name: str, w_OI: np.ndarray) -> float:
    """Error of a format on a sample, relative to its variance, in float64, from the packed bytes."""
    w_hat = np.asarray(formats.get(name).encode(jnp.asarray(w_OI)).decode(), np.float64)
    w = w_OI.astype(np.float64)
    return float(np.mean((w_hat - w) ** 2) / np.mean(w**2))


def scalar_rows(args: argparse.Namespace) -> Row:
    return {
        "bound": {str(r): 2.0 ** (-2 * r) for r in RATES},
        "lloyd_max": {str(r): lloyd_max(r)[1] for r in RATES},
    }


def e8p_rows(args: argparse.Namespace) -> Row:
    shape = (64, 1024) if args.quick else (1024, 1024)
    w = np.random.default_rng(args.seed).standard_normal(shape).astype(np.float32)
    return {
        "e8p": {str(r): measured(f"e8p{r}", w) for r in (2, 3, 4)},
        "e8p_shipped": {str(r): measured(name, w) for r, name in SHIPPED.items()},
    }


ROWS += [scalar_rows, e8p_rows, trellis_rows]


# -- speed ------------------------------------------------------------------------------------------------------------


def e8p_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per million weights of the encoders on rows of 4096, compiled, the least of five calls; the peer's."""
    rows = 32 if args.quick else 512
    w = np.random.default_rng(args.seed).standard_normal((rows, 4096)).astype(np.float32)
    out: dict[str, Any] = {"weights": w.size, "threads": os.cpu_count()}
    for r in (2, 3, 4):
        fmt = formats.get(f"e8p{r}")
        x = jnp.asarray(w)
        params = fmt.fitted(x)
        run = jax.jit(lambda x, p, f=fmt: f.encode(x, p).arrays["codes"]).lower(x, params).compile()
        wall, cpu = least(lambda run=run, x=x, p=params: run(x, p).block_until_ready())
        out |= {f"e8p{r}": wall / w.size * 1e6, f"e8p{r}_cpu": cpu / w.size * 1e6}
        out[f"e8p{r}_temp_bytes_per_weight"] = run.memory_analysis().temp_size_in_bytes / w.size
    out["peer"] = None if args.peer_path is None else peer(args, w[: max(1, rows // 4)], out)
    return out


def least(run: Any, times: int = 5) -> tuple[float, float]:
    """Wall and CPU seconds; the latter, of all threads, hardly depend on what else the machine does."""
    wall, cpu = [], []
    for _ in range(times):
        start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return min(wall), min(cpu)


def peer(args: argparse.Namespace, w: np.ndarray, ours: dict[str, Any]) -> dict[str, Any]:
    """QuIP#'s nearest point on the same vectors: `benchmarks/e8p_peer.py` in the peer's environment."""
    points, rows = lattice.points(), lattice.rows()
    odd = np.bitwise_count(np.arange(1 << 16) & 0xFF) % 2 == 1
    part = points[odd] + np.float32(0.25)
    part = part[((part[:, :7] < 0).sum(1) <= 1) & (part[:, :7].min(1) >= -0.5)]
    index = {tuple(row): i for i, row in enumerate(rows.tolist())}
    x = (w * np.float32(1.03 / np.sqrt(np.mean(w.astype(np.float64) ** 2)))).reshape(-1, 8)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            f"{folder}/input.npz",
            x=x,
            codes=np.asarray(lattice.nearest(jnp.asarray(x))),
            threads=1,  # more burn CPU in waiting, beside other work
            grid_part=part,
            grid_part_norm=np.sum(part**2, axis=1),
            part_abs_map=np.array([index[tuple(np.abs(v))] for v in part.tolist()]),
            grid_abs_odd=rows.sum(1) % 2 == 1,
            bit_map=2 ** np.arange(8),
        )
        program = Path(__file__).with_name("e8p_peer.py")
        argv = [args.peer_python, str(program), str(args.peer_path), f"{folder}/input.npz"]
        done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    for key, name in (("seconds", "e8p2"), ("cpu_seconds", "e8p2_cpu")):
        found[name] = found.pop(key) / w.size * 1e6
    ratios = {"time_ratio": found["e8p2"] / ours["e8p2"], "cpu_ratio": found["e8p2_cpu"] / ours["e8p2_cpu"]}
    return found | {"weights": w.size} | ratios


# -- output -----------------------------------------------------------------------------------------------------------


def table(rows: Row) -> str:
    rates = sorted({r for row in rows.values() for r in row}, key=float)
    width = max(map(len, rows))
    lines = [" ".join(["code".ljust(width), *(f"{r:>8}" for r in rates)])]
    lines += [
        " ".join([name.ljust(width), *(f"{row[r]:8.5f}" if r in row else "       -" for r in rates)])
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def plot(rows: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 5))
    rates = np.linspace(0.9, 4.1, 50)
    ax.plot(rates, 2.0 ** (-2 * rates), "k-", label="bound")
    for name, row in rows.items():
        if name != "bound":
            points = sorted((float(r), e) for r, e in row.items())
            ax.plot(*zip(*points), "o-", label=name)
    ax.set(yscale="log", xlabel="bits per weight", ylabel="error / variance", title="Codes for N(0, 1)")
    ax.legend()
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the samples")
    parser.add_argument("--better", action="store_true", help="longer states and tiles at 2 bits too")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--peer-path", type=Path, help="a checkout of QuIP#")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--require-peer", action="store_true", help="fail without --peer-path")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.require_peer and args.peer_path is None:
        parser.error("--require-peer without --peer-path")
    rows: Row = {}
    for make in ROWS:
        rows |= make(args)
    codes = rows.pop("codes")
    better = better_rows(args) if args.better else None
    speed = e8p_speed(args)
    print(table(rows))
    if speed["peer"]:
        print("QuIP#:", ", ".join(f"{k} {v}" for k, v in speed["peer"].items()))
    print("seconds per million weights:", ", ".join(f"{k} {speed[k]:.4f}" for k in ("e8p2", "e8p3", "e8p4")))
    if args.plot is not None:
        plot(rows, args.plot)
    if args.json:
        print(json.dumps({**rows, "codes": codes, "better": better, "speed": speed, "seed": args.seed}))


if __name__ == "__main__":
    main()

"""Mean squared error of codes for i.i.d. N(0, 1) at 1 to 4 bits, against the rate-distortion bound 2^-2R.

Each row is relative to the sample's own variance, from fresh draws of `--seed`, encoded by the shipped formats at their
own scales and decoded from the packed bytes. Rows:

- `bound`: 2^-2R; `lloyd_max`: the best scalar quantizer, in closed form;
- `e8p`: `e8p2`, `e8p3`, `e8p4` (2^20 samples), and `e8p_shipped` with the scales that QuIP# ships;
- `trellis`: the best code of one value a step, and `hyb`: QTIP's code for pairs (`trellis_rows.py`).

    python benchmarks/distortion.py [--seed 0] [--quick] [--plot distortion.png] [--json]

`--json` prints one object last, `{"bound": {"1": ...}, "lloyd_max": {...}, "e8p": {"2": ..., "3": ..., "4": ...},
"trellis": {"1": ...}, "hyb": {...}}`, under `codes` all trellis codes, and under `speed` seconds per million weights.
`--peer-path DIR`, a checkout of QuIP# (Cornell-RelaxML/quip-sharp, GPL, never vendored; needs torch and CUDA-less
import, see `peer`), measures its own nearest point on the same input.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from trellis_rows import trellis_rows

from lowbit.formats import base as formats
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
        out[f"e8p{r}"] = least(lambda run=run, x=x, p=params: run(x, p).block_until_ready()) / w.size * 1e6
        out[f"e8p{r}_temp_bytes_per_weight"] = run.memory_analysis().temp_size_in_bytes / w.size
    out["peer"] = None if args.peer_path is None else peer(args.peer_path, w[: max(1, rows // 16)], out)
    return out


def least(run: Any, times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def peer(folder: Path, w: np.ndarray, ours: dict[str, Any]) -> dict[str, Any]:
    """QuIP#'s `E8P12_codebook.quantize` in torch on the CPU, and the share of vectors on which ours is as near.

    Its module imports CUDA kernels that its quantizer does not use; they are replaced by empty modules here.
    """
    import subprocess
    import sys
    import types

    import torch

    for name in ("quiptools_cuda", "fast_hadamard_transform"):
        sys.modules.setdefault(name, types.ModuleType(name))
    had = types.ModuleType("lib.utils.matmul_had")
    had.matmul_hadU_cuda = had.matmul_hadUt_cuda = None
    utils, lib, codebook = (types.ModuleType(n) for n in ("lib.utils", "lib", "lib.codebook"))
    lib.__path__, utils.__path__, codebook.__path__ = [], [], [str(folder / "lib/codebook")]
    sys.modules |= {"lib": lib, "lib.utils": utils, "lib.codebook": codebook, "lib.utils.matmul_had": had}
    from lib.codebook.latticee8_padded12 import E8P12_codebook

    torch.set_num_threads(os.cpu_count() or 1)
    book = E8P12_codebook(build_truncated=True)
    x = torch.from_numpy(w.reshape(-1, 8) * np.float32(1.03 / np.sqrt(np.mean(w.astype(np.float64) ** 2))))
    with torch.no_grad():
        seconds = least(lambda: book.quantize(x, True), 3) / w.size * 1e6
        theirs = book.quantize(x, False).numpy().astype(np.float64)
    error = float(np.mean((theirs - x.numpy()) ** 2) / np.mean(x.numpy() ** 2))
    commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or None,
        "weights": w.size,
        "e8p2": seconds,
        "e8p2_time_ratio": seconds / ours["e8p2"],
        "error": error,
        "our_error": measured("e8p2", w),
    }


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
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--peer-path", type=Path, help="a checkout of QuIP#")
    parser.add_argument("--require-peer", action="store_true", help="fail without --peer-path")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.require_peer and args.peer_path is None:
        parser.error("--require-peer without --peer-path")
    rows: Row = {}
    for make in ROWS:
        rows |= make(args)
    codes = rows.pop("codes")
    speed = e8p_speed(args)
    print(table(rows))
    print("seconds per million weights:", ", ".join(f"{k} {speed[k]:.4f}" for k in ("e8p2", "e8p3", "e8p4")))
    if args.plot is not None:
        plot(rows, args.plot)
    if args.json:
        print(json.dumps({**rows, "codes": codes, "speed": speed, "seed": args.seed}))


if __name__ == "__main__":
    main()

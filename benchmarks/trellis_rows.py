"""The trellis rows of `distortion.py`: tiles of 256 weights as closed paths, L = 16, every code of
`lowbit.vq.trellis_codes` at 1, 2, 3 and 4 bits.

The scale is the best of three on draws of their own; then three seeds of 131072 weights. Errors are divided by the
sample's variance, and the mean of the seeds is given.
"""

import argparse
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowbit.formats import base
from lowbit.vq.trellis_codes import CODES, rms_of, table_of
from lowbit.vq.viterbi import tail_biting

RATES = (1, 2, 3, 4)
T, TILES, SCAN, SEEDS = 256, 512, 96, 3
# Bits of a state, weights of a tile, steps of the first pass on either side of the ends (0: half a tile).
BETTER = (
    (16, 256, 0),
    (16, 256, 256),
    (16, 1024, 0),
    (18, 256, 0),
    (18, 256, 256),
    (18, 1024, 0),
    (20, 256, 256),
    (20, 1024, 0),
)


def trellis_error(name: str, ratio: float, x_ZT: np.ndarray, around: int = 0) -> float:
    """Error of tiles `x` in one format, over their variance, at RMS of the input = `ratio` * RMS of the code; `around`
    as `tail_biting` takes it."""
    fmt = base.get(name)
    table_VS = table_of(fmt.code, fmt.trellis)
    scale = np.float32(ratio * rms_of(fmt.code, fmt.trellis))
    x_ZNV = (x_ZT * scale).reshape(len(x_ZT), -1, fmt.V)
    states = np.asarray(tail_biting(fmt.trellis, table_VS, jnp.asarray(x_ZNV), around=around))
    error = np.moveaxis(np.asarray(table_VS)[:, states], 0, -1).astype(np.float64) - x_ZNV
    return float(np.mean(error**2) / np.mean(x_ZNV.astype(np.float64) ** 2))


def trellis_rows(args: argparse.Namespace) -> dict[str, Any]:
    """`{"trellis": {rate: error}, "hyb": {rate: error}, "codes": {name: {...}}}`: the least error of all codes but
    `hyb` and `lut`, that of QTIP's code for pairs, and all of them with their best ratio of RMS, standard error and CPU
    seconds."""
    tiles, seeds = (64, 1) if args.quick else (TILES, SEEDS)
    codes: dict[str, Any] = {}
    for rate in RATES:
        for code in CODES:
            name = f"trellis{rate}:{code}"
            start, best = time.process_time(), base.get(name).ratio
            if not args.quick:
                x = np.random.default_rng([args.seed, rate, 99]).standard_normal((SCAN, T)).astype(np.float32)
                best = min((best - 0.05, best, best + 0.05), key=lambda r, name=name, x=x: trellis_error(name, r, x))
            errors = []
            for i in range(seeds):
                x = np.random.default_rng([args.seed, rate, i]).standard_normal((tiles, T)).astype(np.float32)
                errors.append(trellis_error(name, best, x))
            spread = float(np.std(errors, ddof=1) / np.sqrt(seeds)) if seeds > 1 else None
            seconds = time.process_time() - start
            error = float(np.mean(errors))
            codes[name] = {"error": error, "ratio": round(best, 3), "se": spread, "cpu_seconds": seconds}
            print(f"{name:16} {error:.5f}  ratio {best:.2f}  {seconds:.0f} s of CPU", flush=True)

    def least(rate: int, among: list[str]) -> float:
        return min(codes[f"trellis{rate}:{c}"]["error"] for c in among)

    return {
        "trellis": {str(r): least(r, [c for c in CODES if c not in ("hyb", "lut")]) for r in RATES},
        "hyb": {str(r): least(r, ["hyb"]) for r in RATES},
        "codes": codes,
    }


def better_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a longer state, a longer tile and a longer first pass are worth at 2 bits, all on the same 32768 weights."""
    rows = []
    x = np.random.default_rng([args.seed, 2, 7]).standard_normal(4096 if args.quick else 32768).astype(np.float32)
    for L, length, around in BETTER[:3] if args.quick else BETTER:
        fmt, start = f"trellis2:latin:l{L}", time.process_time()
        error = trellis_error(fmt, base.get(fmt).ratio, x.reshape(-1, length), around)
        ms = (time.process_time() - start) / x.size * 256e3
        rows.append({"format": fmt, "tile": length, "around": around, "error": error, "cpu_ms_per_256": ms})
        print(f"{fmt} tiles of {length}, around {around or length // 2}: {error:.5f}, {ms:.0f} ms of CPU", flush=True)
    return rows

"""The factored Hadamard transform against the dense product, in jax and in numpy, and against numpy's butterflies.

512 rows in float32 of the widths of Llama 2 7B's MLP (11008 = 172 x 64), Llama 3 8B's (14336 = 28 x 512), Qwen2.5 7B's
(18944 = 148 x 128) and of a power of two (4096). Minimum of interleaved rounds; results are compared first. The
butterflies are the usual O(n log n) loop over pairs, on the part of the width that is a power of two, after a product
with the core.

    python benchmarks/hadamard.py [--quick] [--json]

`--json` prints one object last: for each width the milliseconds of each, and `dense`, `numpy_dense` and `numpy_fast` as
ratios to ours (above 1: ours is faster).
"""

import argparse
import importlib.metadata
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.linalg import hadamard

WIDTHS = (4096, 11008, 14336, 18944)
ROWS = 512


def butterflies(x: np.ndarray) -> np.ndarray:
    """The Sylvester transform of the last axis by additions of pairs, unscaled."""
    n, h = x.shape[-1], 1
    x = x.copy()
    while h < n:
        x = x.reshape(*x.shape[:1], -1, 2, h)
        x = np.concatenate([x[..., :1, :] + x[..., 1:, :], x[..., :1, :] - x[..., 1:, :]], axis=-2)
        x = x.reshape(x.shape[0], -1)
        h *= 2
    return x


def numpy_fast(n: int):
    """`x -> x H^T / sqrt(n)` with one product by the core and butterflies for the rest."""
    large = [c for c in hadamard.cores(n) if c.order & (c.order - 1)]
    core = np.ones((1, 1), np.float32)
    for c in large:
        core = np.kron(core, c.matrix()).astype(np.float32)
    k, scale = len(core), np.float32(n**-0.5)

    def run(x: np.ndarray) -> np.ndarray:
        y = np.matmul(core, x.reshape(len(x), k, n // k)) if k > 1 else x
        return butterflies(y.reshape(-1, n // k)).reshape(x.shape) * scale

    return run


def measure(n: int, rounds: int) -> dict[str, float]:
    """Seconds of each way to transform `[ROWS, n]`."""
    transform = hadamard.transform(n)
    dense = transform.dense().astype(np.float32)
    x = np.random.default_rng(0).standard_normal((ROWS, n)).astype(np.float32)
    x_jax, dense_jax = jnp.asarray(x), jnp.asarray(dense)
    fast = jax.jit(transform)
    product = jax.jit(lambda x, h: jnp.einsum("...i,oi->...o", x, h, precision=jax.lax.Precision.HIGHEST))
    butterfly = numpy_fast(n)
    runs = {
        "ours": lambda: jax.block_until_ready(fast(x_jax)),
        "dense": lambda: jax.block_until_ready(product(x_jax, dense_jax)),
        "numpy_dense": lambda: x @ dense.T,
        "numpy_fast": lambda: butterfly(x),
    }
    want = runs["numpy_dense"]()
    for name, run in runs.items():
        np.testing.assert_allclose(run(), want, atol=1e-3, err_msg=name)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4096 alone, 3 rounds instead of 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    out = {}
    for n in WIDTHS[:1] if args.quick else WIDTHS:
        best, name = measure(n, 3 if args.quick else 5), hadamard.transform(n).name
        ratios = {k: round(s / best["ours"], 2) for k, s in best.items() if k != "ours"}
        ms = {k: round(1e3 * s, 2) for k, s in best.items()}
        out[str(n)] = {**ratios, "ms": ms, "transform": name}
        print(f"{n:6d} {name:32s} ours {ms['ours']:8.2f} ms, times ours: {ratios}")
    out |= {"rows": ROWS, "device": jax.devices()[0].device_kind, "python": platform.python_version()}
    out["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "numpy")}
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()

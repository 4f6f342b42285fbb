"""What vector quantizers' searches hold besides their arguments and results: XLA's temporary buffers, in MiB.

    python benchmarks/vq_memory.py [--time]

E8P: `quantize`, the search alone, and `encode`, with the fit of the scale and the packing. AQLM: one beam search over
all codes (`lowbit.ptq.aqlm.sweep`). Nothing is run, only compiled; `--time` runs E8P's, and prints CPU seconds a
million weights (best of four).
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.formats import base as formats
from lowbit.ptq import aqlm
from lowbit.vq import e8

SHAPES = ((512, 4096), (4096, 4096), (4096, 14336))
F32 = jnp.float32


def mib(program: jax.stages.Compiled) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def e8p_rows(timed: bool) -> None:
    for name in ("e8p2", "e8p3", "e8p4"):
        fmt = formats.get(name)
        for O, I in SHAPES:
            w, scale = jax.ShapeDtypeStruct((O, I), F32), {"scale": jax.ShapeDtypeStruct((1, 1), F32)}
            search, encode = jax.jit(fmt.quantize).lower(w, scale).compile(), jax.jit(fmt.encode).lower(w).compile()
            line = f"{name} {O} x {I}: search {mib(search):.1f} MiB, encode {mib(encode):.1f} MiB"
            if timed:
                w = jnp.asarray(np.random.default_rng(0).standard_normal((O, I), np.float32))
                seconds = []
                for _ in range(4):
                    start = time.process_time()
                    jax.block_until_ready(encode(w))
                    seconds.append(time.process_time() - start)
                line += f", encode {min(seconds) / w.size * 1e6:.4f} CPU s a million weights"
            print(line, flush=True)


def aqlm_rows() -> None:
    for name, beam in (("aqlm:2x8:g8", 1), ("aqlm:2x8:g8", 8), ("aqlm:1x16:g8", 1), ("aqlm:1x16:g8", 8)):
        fmt = formats.get(name)
        for O, I in SHAPES:
            shapes = (O, I), (I, I), (fmt.number, 1, 2**fmt.bits, fmt.size), (O, 1)
            w, h, book, scale = (jax.ShapeDtypeStruct(s, F32) for s in shapes)
            codes = jax.ShapeDtypeStruct((O, I // fmt.size * fmt.number), jnp.int32)
            order = aqlm.order_of(fmt, codes.shape[1], np.random.default_rng(0))
            program = aqlm.sweep.lower(fmt, beam, w, h, codes, {"codebook": book, "scale": scale}, order).compile()
            rows = min(O, aqlm.rows_at_once(fmt, beam, I))
            print(f"{name} beam {beam} {O} x {I}: {rows} rows at once, {mib(program):.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    print(f"E8P searches {e8.PART} weights at a time, AQLM {aqlm.STATES} states in at most {aqlm.SPACE >> 20} MiB")
    e8p_rows(args.time)
    aqlm_rows()


if __name__ == "__main__":
    main()

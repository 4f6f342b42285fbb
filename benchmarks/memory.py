"""Peak memory of `lowbit quantize`, `lowbit export` and Block-AP on a checkpoint larger than what they may use.

    python benchmarks/memory.py [--quick] [--json]

Writes a random bf16 Llama of at least 2 GiB as sharded safetensors (`--quick`: about 0.25 GiB), then runs in processes
of their own: `quantize`, the command to int4:g64; `gguf`, what `lowbit export` runs, from the quantized folder to
gguf:Q4_0; `fresh`, the same from the bf16 folder, whose weights it rounds itself. The exports read every weight of the
file back and compare it. The KL of small models, which needs both in memory, is not among it: this one is too large,
and `--quick` says so by an argument. Each reports the peak resident size (VmHWM) above what it had after its imports.
Allowed: the largest shard + two blocks in float32 + 300 MiB. `block-ap` trains the blocks of the bf16 folder to
int2:g64:asym, one after the other (8 rows of 64 tokens); allowed: what a step on one block takes by its own estimate
(`step_memory`: weights, two moments, temporaries), two blocks in float32 (the best weights so far, what was read), the
two streams of activations, the packed model, what lies outside of blocks twice, + 300 MiB. Exits with 1 above that.
Needs about twice the model's size on disk. Linux only (reads /proc).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
ROWS, LENGTH = 8, 64  # of Block-AP's text
SLACK = 300 * MIB


def build(folder: Path, quick: bool) -> tuple[int, int, int, int]:
    """Writes the model; returns its bytes, those of the largest shard, of one block in float32 and of what lies outside
    of blocks."""
    import ml_dtypes
    import numpy as np

    from lowbit.models.config import ModelConfig
    from lowbit.models.hf import HfWriter
    from lowbit.models.shards import atomic_folder

    size = dict(hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64)
    if not quick:
        size = dict(hidden_size=2048, intermediate_size=5632, num_layers=24, num_heads=32, num_kv_heads=4, head_dim=64)
    config = ModelConfig(family="llama", vocab_size=8192 if quick else 32000, max_position=2048, **size)
    rng = np.random.default_rng(0)
    with atomic_folder(folder) as tmp:
        writer = HfWriter(tmp, config, None, False, (64 if quick else 384) * MIB)
        for path, shape in config.shapes().items():
            w = rng.standard_normal(shape, np.float32) * 0.02 if len(shape) == 2 else np.ones(shape, np.float32)
            writer.add(path, w.astype(ml_dtypes.bfloat16))
        writer.close()
    shards = [p.stat().st_size for p in folder.glob("*.safetensors")]
    block = 4 * sum(o * i for o, i in config.linear_shapes().values())
    outside = 2 * sum(math.prod(s) for p, s in config.shapes().items() if ".layers." not in p)
    return sum(shards), max(shards), block, outside


def job(name: str, src: str, out: str, kl_bytes: str) -> None:
    """One measured job; prints its baseline and peak in bytes."""
    from lowbit.commands.quantize import Quantize
    from lowbit.evaluate import size
    from lowbit.export import verify
    from lowbit.export.api import export
    from lowbit.ptq import rtn

    _ = size, verify, rtn
    import jax

    jax.devices()
    baseline, start = status("VmRSS"), time.monotonic()
    more = {}
    if name == "block-ap":
        found, more = block_by_block(src, out)
    elif name == "quantize":
        found = Quantize(src, Path(out), "int4:g64").main().data["params"]
    else:
        report = export(src, "gguf:Q4_0", out, kl_bytes=int(kl_bytes))
        found = report["weights"]
        if report["kl_mean"] is not None:
            raise SystemExit(f"KL of {src} computed (allowed: a model too large for it)")
    seconds = time.monotonic() - start
    print(json.dumps({"baseline": baseline, "peak": status("VmHWM"), "seconds": seconds, "weights": found, **more}))


def block_by_block(src: str, out: str) -> tuple[int, dict[str, int]]:
    """Block-AP of a folder; how many weights it packed, and what a step should take."""
    import numpy as np

    from lowbit import tree as trees
    from lowbit.commands.inspect import read_abstract
    from lowbit.models.hf import readers
    from lowbit.models.model import Model
    from lowbit.plan import Plan
    from lowbit.qat.block_ap import block_ap, step_memory
    from lowbit.train.block_options import BlockOptions

    config, params = read_abstract(src)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH))
    options, done = BlockOptions(rows=ROWS - 2, valid_rows=2, epochs=1), []
    plan = Plan.uniform("int2:g64:asym:rounded").resolve(config.shapes())
    block_ap(Model(config, params), plan, tokens, options, out, lambda r, n: done.append(r), read=readers(src))
    layer = trees.build({p: a for p, a in trees.items(params) if ".layers.0." in p})
    estimate = step_memory(config, layer, {s: f for s, f in plan.items() if ".layers.0." in s}, options, LENGTH)
    return sum(report["weights"] for report in done), estimate


def status(key: str) -> int:
    """A size from /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status (allowed: Linux)")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a model of about 0.25 GiB")
    args.add_argument("--json", action="store_true", help="print one JSON object last")
    args.add_argument("--dir", help="where the model goes for the time of the run (default: the system's)")
    args.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    a = args.parse_args()
    if a.job:
        return job(*a.job)
    from lowbit.export.api import KL_BYTES

    with tempfile.TemporaryDirectory(dir=a.dir) as tmp:
        src = Path(tmp) / "model"
        total, shard, block, around = build(src, a.quick)
        limit = shard + 2 * block + SLACK
        report = {"model_bytes": total, "largest_shard": shard, "block_fp32": block, "limit": limit}
        print(f"model {total / MIB:.0f} MiB, largest shard {shard / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB")
        kl_bytes = "0" if a.quick else str(KL_BYTES)
        packed = Path(tmp) / "packed"
        jobs = {"quantize": (src, packed), "gguf": (packed, packed.with_suffix(".gguf")), "fresh": (src, f"{src}.gguf")}
        jobs["block-ap"] = (src, f"{src}.blocks")
        for name, paths in jobs.items():
            command = [sys.executable, __file__, "--job", name, *map(str, paths), kl_bytes]
            run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if run.returncode:
                raise SystemExit(f"{name} failed:\n{run.stderr}")
            r = json.loads(run.stdout.splitlines()[-1])
            r["above_baseline"] = r["peak"] - r["baseline"]
            r["limit"] = limit
            if name == "block-ap":
                r["limit"] = sum(r[k] for k in ("arguments", "temporaries", "streams")) + 2 * block
                r["limit"] += total // 6 + 2 * around + SLACK
            r["within_limit"] = r["above_baseline"] <= r["limit"]
            report[name] = r
            allowed = f"allowed {r['limit'] / MIB:.0f}"
            print(f"{name}: {r['above_baseline'] / MIB:.0f} MiB above the baseline, {allowed}, {r['seconds']:.0f} s")
    report["within_limit"] = all(report[n]["within_limit"] for n in jobs)
    if a.json:
        print(json.dumps(report))
    raise SystemExit(0 if report["within_limit"] else 1)


if __name__ == "__main__":
    main()

"""What each recipe costs a training step: lowbit-base, 2048 tokens, forward KL to a frozen teacher.

One process; the steps of all recipes in turn, round after round, the minimum of each (a shared machine only ever adds
time). `ratio` is to the step of the same model without quantization, teacher included; `cpu_ratio` the same in
processor seconds, which a busy machine disturbs less. Scales that are searched (`:mse`, k-quants) are searched at every
step by `ste` and once by `ste-learned`.

    python benchmarks/qat_recipes.py [--quick] [--json]

`--json` prints one object last: `{row: {"step_ms", "ratio", "cpu_ratio"}}`, versions.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from typing import Any

from lowbit import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla.flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import qat
from lowbit.export.open import open_model
from lowbit.plan import Plan, Rule
from lowbit.train import sharding
from lowbit.train import step as steps
from lowbit.train.config import TrainConfig
from lowbit.train.objective import language

BATCH, LENGTH = 8, 256
# recipe, format of the linears inside blocks, format of their inputs
ROWS = (
    ("ste", "int4:g64", ""),
    ("ste", "ternary:tensor", ""),
    ("ste", "q4_0", ""),
    ("ste", "q2_k:absmax", ""),
    ("ste", "int4:g64", "int8:token"),
    ("ste-learned", "int2:g64:signmse:lsq", ""),
    ("ste-learned", "q4_0:mse:lsq", ""),
    ("ste-learned", "q2_k:lsq", ""),
    ("lsq", "int4:channel", ""),
    ("paretoq", "int2:channel:midrise", ""),
    ("dorefa", "dorefa4:tensor", ""),
    ("bitnet", "ternary:tensor", ""),
    ("bitnet-v2", "ternary:tensor", ""),
    ("llm-qat", "int4:channel", "int8:token"),
    ("parq", "int4:g64", ""),
    ("qlora:r16", "nf4", ""),
    ("ste", "int2:g64:mse", ""),
    ("ste", "q2_k", ""),
)
QUICK = (ROWS[0], ROWS[5], ROWS[11])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three recipes, three rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    model = open_model("lowbit-base")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params)
    config = TrainConfig(steps=1000, batch_size=BATCH, lr=1e-4, loss="kl")
    objective = language(model.config, config, model.config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    runs: dict[str, Any] = {}

    def add(name: str, tree: Any, wrap: Any = None) -> None:
        setup = steps.prepare(tree, objective, config, params, wrap)
        rows = sharding.place_batch({"tokens": tokens}, setup.sharding.mesh)
        runs[name] = [setup, setup.learned, setup.init(setup.learned), rows]

    add("plain", params)
    for recipe, fmt, act in QUICK if args.quick else ROWS:
        r = qat.get(recipe)
        plan = Plan((Rule(r"model\.layers\..*:in", act),) if act else (), fmt)
        tree = r.prepare(params, plan.resolve(model.config.shapes()))
        add(" ".join(filter(None, (recipe, fmt, act))), tree, r.wrap)

    best: dict[str, tuple[float, float]] = {}
    for i in range(rounds + 1):  # the first compiles
        for name, run in runs.items():
            setup, learned, opt, rows = run
            wall, cpu = time.perf_counter(), time.process_time()
            learned, opt, metrics = setup.step(learned, opt, setup.frozen, setup.teacher, rows)
            jax.block_until_ready(metrics)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            run[1:3] = learned, opt
            if i:
                before = best.get(name, (np.inf, np.inf))
                best[name] = min(before[0], wall), min(before[1], cpu)
    wall, cpu = best["plain"]
    result: dict[str, Any] = {
        name: {"step_ms": round(1e3 * a, 1), "ratio": round(a / wall, 3), "cpu_ratio": round(b / cpu, 3)}
        for name, (a, b) in best.items()
    }
    for name, row in result.items():
        print(f"{name:40s} {row['step_ms']:8.1f} ms  {row['ratio']:.3f}  cpu {row['cpu_ratio']:.3f}", flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "optax", "numpy")}
    result = {"rows": result, "versions": versions, "python": platform.python_version()}
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Eight simulated devices against one: prints JSON (see `test_sharding.py`)."""

import dataclasses
import json
import os
import sys

N = int(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={N}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from models import CONFIG, params, rows  # noqa: E402

from lowbit import qat  # noqa: E402
from lowbit import tree as trees  # noqa: E402
from lowbit.plan import Plan  # noqa: E402
from lowbit.train import checkpoint, objective  # noqa: E402
from lowbit.train.config import TrainConfig  # noqa: E402
from lowbit.train.loop import train  # noqa: E402
from lowbit.train.memory import estimate  # noqa: E402

directory, mesh = sys.argv[2], (2, 2, 2) if N == 8 else (1, 1, 1)
assert jax.device_count() == N
out = {}

# The first step without fake quantization: plain gradient descent, so that the change of a weight is its gradient.
config = TrainConfig(
    steps=1, batch_size=8, microbatches=2, optimizer="sgd", b1=0.0, lr=1.0, schedule="constant", clip=0.0, mesh=mesh
)
before = dict(trees.items(params()))
plain = train(params(), rows(8), objective.language(CONFIG, config), config)
grads = {p: np.asarray(before[p]) - np.asarray(a) for p, a in trees.items(plain.params)}
np.savez(f"{directory}/grads{N}.npz", **grads)
out["loss"], out["whole"] = plain.history[0]["loss"], plain.whole
spec = plain.params["model"]["layers"]["0"]["self_attn"]["q_proj"].sharding.spec
out["q_proj"] = [spec[i] if i < len(spec) else None for i in range(2)]

# Twenty steps with fake quantization and a teacher; half of them, then resumed on this mesh.
config = dataclasses.replace(
    config, steps=20, microbatches=1, optimizer="adamw", lr=1e-3, b1=0.9, clip=1.0, loss="kl", log_every=1
)
latent = qat.get("ste-learned").prepare(params(), Plan.uniform("int3:g16").resolve(CONFIG.shapes()))
loss = objective.language(CONFIG, config, CONFIG)
args = dict(teacher=params(1), directory=f"{directory}/run{N}")
curve = train(latent, rows(8), loss, dataclasses.replace(config, steps=10), **args).history
curve += train(latent, rows(8), loss, config, resume=True, **args).history
out["curve"] = [r["loss"] for r in curve]
out["steps"] = [r["step"] for r in curve]
if N == 1:  # the checkpoint of eight devices, on one
    loaded, meta = checkpoint.load(f"{directory}/run8")
    out["loaded"] = [meta.step, len(jax.tree.leaves(loaded)), int(loaded["lm_head"].shape[0])]
else:
    memory = estimate(
        lambda: params(),
        {"tokens": ((8, 17), np.int32)},
        objective.language(CONFIG, config, CONFIG),
        config,
        lambda: params(),
    )
    out["memory"] = dataclasses.asdict(memory)
print(json.dumps(out))

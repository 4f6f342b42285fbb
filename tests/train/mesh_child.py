"""Eight simulated devices against one: prints JSON (see `test_sharding.py`)."""

import dataclasses
import json
import os
import sys
from functools import partial

N = int(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={N}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from models import CONFIG, params, rows  # noqa: E402

from lowbit import qat  # noqa: E402
from lowbit import tree as trees  # noqa: E402
from lowbit.models import decoder  # noqa: E402
from lowbit.plan import Plan  # noqa: E402
from lowbit.train import objective  # noqa: E402
from lowbit.train.config import TrainConfig  # noqa: E402
from lowbit.train.loop import train  # noqa: E402
from lowbit.train.memory import estimate  # noqa: E402

directory, mesh = sys.argv[2], (2, 2, 2) if N == 8 else (1, 1, 1)
assert jax.device_count() == N
decoder.SCAN_FROM = 2  # large models scan
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

# Twenty steps with fake quantization and a teacher.
config = dataclasses.replace(
    config, steps=20, microbatches=1, optimizer="adamw", lr=1e-3, b1=0.9, clip=1.0, loss="kl", log_every=1
)
latent = qat.get("ste-learned").prepare(params(), Plan.uniform("int3:g16").resolve(CONFIG.shapes()))
loss = objective.language(CONFIG, config, CONFIG)
quantized = train(latent, rows(8), loss, config, teacher=params(1), directory=f"{directory}/run{N}")
out["curve"] = [r["loss"] for r in quantized.history]

# PV-Tuning: gradients, curvature and changed codes, from the same packed model.
pv = qat.get("e2e-pv")
tuned = dataclasses.replace(config, steps=5, revise_every=2, revise_rows=8, revise_fraction=0.02)
coded = pv.prepare(params(), Plan.uniform("rht:f16:blocks:int2:g16").resolve(CONFIG.shapes()))
revise = partial(pv.revise, CONFIG)
out["pv"] = train(coded, rows(8), loss, tuned, teacher=params(1), revise=revise).history
if N == 1:  # eight devices' checkpoint goes on here, on one
    longer = dataclasses.replace(config, steps=21)
    moved = train(latent, rows(8), loss, longer, teacher=params(1), directory=f"{directory}/run8", resume=True)
    out["moved"] = [r["step"] for r in moved.history]
    drift = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), moved.params, quantized.params
    )
    out["drift"] = max(jax.tree.leaves(drift))
else:
    batch = {"tokens": ((8, 17), np.int32)}
    out["memory"] = dataclasses.asdict(estimate(params, batch, loss, config, params))
print(json.dumps(out))

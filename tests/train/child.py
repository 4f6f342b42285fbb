"""A training run in a process of its own, to be killed: `child.py DIR STEPS [key=value ...]`.

Appends one line per step, `step loss-as-hex lr-as-hex`, to DIR/curve.txt. Keys: `slow` seconds per batch, `kill` step
at which it kills itself with SIGKILL, `resume`, `fsize` limit of bytes per file, and any field of `TrainConfig`.
"""

import os
import signal
import sys
import time
from pathlib import Path

from models import CONFIG, params, rows

from lowbit import qat
from lowbit.errors import InputError
from lowbit.plan import Plan
from lowbit.train import objective
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train

directory, steps = Path(sys.argv[1]), int(sys.argv[2])
options = dict(a.split("=") for a in sys.argv[3:])
slow, kill = (float(options.pop(k, 0)) for k in ("slow", "kill"))
resume, fsize = bool(options.pop("resume", "")), int(options.pop("fsize", 0))
types = {k: type(getattr(TrainConfig, k)) for k in options}
config = TrainConfig(steps=steps, batch_size=4, log_every=1, **{k: types[k](v) for k, v in options.items()})
batch = rows()
loss = objective.language(CONFIG, config)


def slowly(step):
    time.sleep(slow)
    if kill and step == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(step)


def on_metrics(record):
    with open(directory / "curve.txt", "a") as f:
        f.write(f"{record['step']} {record['loss'].hex()} {record['lr'].hex()}\n")


if fsize:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
directory.mkdir(parents=True, exist_ok=True)
latents = qat.get("ste-learned").prepare(params(), Plan.uniform("int3:g16").resolve(CONFIG.shapes()))
try:
    result = train(
        latents, slowly, loss, config, directory=directory / "checkpoints", resume=resume, on_metrics=on_metrics
    )
except InputError as e:
    print(f"{type(e).__name__}: {e}", file=sys.stderr)
    sys.exit(2)
print(result.status, result.step, result.message)

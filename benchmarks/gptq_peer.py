"""GPTQModel's GPTQ of single weights, for `benchmarks/gptq.py`, which starts this with another Python.

    python benchmarks/gptq_peer.py FOLDER

reads `NAME BITS GROUP MODE` lines from standard input (MODE: `plain`, or `default` for its own act-group-aware order),
takes weight and inputs from FOLDER/NAME.npz, leaves the quantized weight in FOLDER/peer.npy and answers
`RESULT {"seconds": ..., "versions": ...}`. Hessians are accumulated outside of the clock.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

ROWS = 1024  # tokens added to the Hessian at once


def solve(w: np.ndarray, x: np.ndarray, bits: int, group: int, mode: str) -> tuple[float, np.ndarray]:
    """Seconds from the Hessian on, and the quantized weight."""
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = torch.from_numpy(w.copy())
    aware = mode == "default"
    config = QuantizeConfig(
        bits=bits, group_size=group, sym=True, desc_act=False, act_group_aware=aware, damp_percent=0.01
    )
    task = GPTQ(module, config)
    task.quantizer.configure(perchannel=True)
    for part in torch.from_numpy(x).split(ROWS):
        task.add_batch(part[None], None)
    task.finalize_hessian()
    start = time.perf_counter()
    out = task.quantize()[0]
    return time.perf_counter() - start, out.float().numpy()


def main() -> None:
    folder = Path(sys.argv[1])
    versions = {p: importlib.metadata.version(p) for p in ("gptqmodel", "torch")} | {"threads": torch.get_num_threads()}
    print("RESULT " + json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        name, bits, group, mode = line.split()
        problem = np.load(folder / f"{name}.npz")
        seconds, w_hat = solve(problem["w"], problem["x"], int(bits), int(group), mode)
        np.save(folder / "peer.npy", w_hat)
        print("RESULT " + json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

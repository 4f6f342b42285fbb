"""QuIP#'s own nearest point (torch, CPU) for `benchmarks/distortion.py`, which runs this in the peer's environment.

    python benchmarks/e8p_peer.py DIR INPUT.npz

`DIR` is a checkout of Cornell-RelaxML/quip-sharp (GPL, never vendored). Of its class `E8P12RVQ3B_codebook`, the methods
`round`, `fast_quantize_part` and `quantize_e8p` are compiled from its file and run as they are, on buffers that the
input holds: importing the module would need CUDA kernels and spend gigabytes on tables. Prints one JSON object.
"""

import ast
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import torch

METHODS = ("round", "fast_quantize_part", "quantize_e8p")


def main() -> None:
    folder, given = sys.argv[1], np.load(sys.argv[2])
    source = open(os.path.join(folder, "lib/codebook/latticee8_padded12_rvq3bit.py"), encoding="utf-8").read()
    book = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "E8P12RVQ3B_codebook")
    names: dict = {"torch": torch}
    exec(compile(ast.Module([n for n in book.body if getattr(n, "name", "") in METHODS], []), folder, "exec"), names)
    self = types.SimpleNamespace(codesz=8)
    for key in ("grid_part", "grid_part_norm", "part_abs_map", "grid_abs_odd", "bit_map"):
        setattr(self, key, torch.from_numpy(given[key]))
    for name in METHODS:
        setattr(self, name, types.MethodType(names[name], self))
    torch.set_num_threads(int(given["threads"]))
    x = torch.from_numpy(given["x"])
    seconds, cpu = [], []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter(), time.process_time()
            values, codes = self.quantize_e8p(x)
            seconds.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    error = float(np.mean((values.numpy().astype(np.float64) - given["x"]) ** 2) / np.mean(given["x"] ** 2.0))
    agree = float(np.mean(codes.numpy() == given["codes"]))
    found = {"seconds": min(seconds), "cpu_seconds": min(cpu), "error": error, "same_codes": agree}
    print(json.dumps({"commit": commit or None, **found}))


if __name__ == "__main__":
    main()

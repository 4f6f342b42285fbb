"""AQLM's own beam search (torch, CPU) for `benchmarks/vq_speed.py`, which runs this in the peer's environment.

    python benchmarks/aqlm_peer.py DIR INPUT.npz OUTPUT.npz

`DIR` is a checkout of Vahe1994/AQLM (Apache-2.0, not vendored). Its `beam_search_optimal_codes` is imported and run as
it is, scripted by torch as it ships, groups and codebooks in their natural order; compiled before on four groups.
Writes the codes, prints one JSON object behind the word RESULT.
"""

import json
import resource
import sys
import time

import numpy as np
import torch


def main() -> None:
    folder, given, out = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
    sys.path.insert(0, folder)
    from src.beam_search_xtx import beam_search_optimal_codes

    def search(rows: int, groups: int) -> np.ndarray:
        wide = groups * given["books"].shape[-1]
        return beam_search_optimal_codes(
            XTX=torch.from_numpy(given["XTX"][:wide, :wide].copy()),
            reference_weight=torch.from_numpy(given["w"][:rows, :wide].copy()),
            codebooks=torch.from_numpy(given["books"]),
            prev_codes=torch.from_numpy(given["codes"][:rows, :groups].copy()),
            scales=torch.from_numpy(given["scales"][:rows]),
            beam_size=int(given["beam"]),
            dim_rng=None,
            verbose=False,
        ).numpy()

    torch.set_num_threads(int(given["threads"]))
    rows, groups = given["codes"].shape[:2]
    search(rows, min(groups, 4))  # torch compiles here
    seconds = []
    for _ in range(1 + (rows <= 64)):
        wall, cpu = time.perf_counter(), time.process_time()
        codes = search(rows, groups)
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    np.savez(out, codes=codes)
    cpu, wall = min(seconds)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    threads, version = torch.get_num_threads(), torch.__version__
    print("RESULT", json.dumps({"cpu": cpu, "wall": wall, "threads": threads, "peak_rss_mib": mib, "torch": version}))


if __name__ == "__main__":
    main()

"""torchao's side of `qat_peers.py`: QAT of int4 weights in groups of 32 on a transformers model. Prints one JSON line.

python qat_torchao_peer.py FOLDER LR, with FOLDER/model (Hugging Face) and FOLDER/tokens.npz.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, lr = Path(sys.argv[1]), float(sys.argv[2])
    torch.manual_seed(0)
    arrays = np.load(folder / "tokens.npz")
    tokens, held_out = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("tokens", "held_out"))
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and ".layers." in name)

    def divergence(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            goal = torch.log_softmax(teacher(batch).logits, -1)
        mine = torch.log_softmax(model(batch).logits, -1)
        return (goal.exp() * (goal - mine)).sum(-1).mean()

    def measure() -> float:
        with torch.no_grad():
            return float(np.mean([divergence(held_out[i : i + 8]).item() for i in range(0, len(held_out), 8)]))

    before, seconds = measure(), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for i, batch in enumerate(tokens):
        start = time.perf_counter()
        optimizer.zero_grad()
        divergence(batch).backward()
        optimizer.step()
        seconds += time.perf_counter() - start if i else 0.0
    rate = (len(tokens) - 1) * tokens[0].numel() / seconds
    found = {"rtn": round(before, 5), "kl": round(measure(), 5), "tokens_per_second": round(rate)}
    print(json.dumps(found | {"versions": {p: importlib.metadata.version(p) for p in ("torch", "torchao")}}))


if __name__ == "__main__":
    main()

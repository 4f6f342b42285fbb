"""Adapters as a folder that Hugging Face's `peft` loads: `adapter_config.json` and `adapter_model.safetensors`.

The tensors of a weight are `base_model.model.PATH.lora_A.weight [r, in]` and `...lora_B.weight [out, r]`, float32, and
`lora_alpha / r` is the scaling. Pooled adapters (QA-LoRA) are written with each column of A repeated for the inputs of
its group, which is the same map. The base that they belong to is `base(model)`, the packed weights decoded:

    export(base(model), "hf", "base"); export_peft(model, "adapters", "base")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapters")
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import files
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.adapter import Adapter, bare
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import CacheSite
from lowbit.models.model import Model


def adapters_of(model: Model) -> dict[str, Adapter]:
    """`{path: adapter}`. Raises `InputError` where there is none, and where a layer's input is prepared, as the other
    library sees it as it is."""
    found = {}
    for path, leaf in trees.items(model.params):
        inner = leaf.w if isinstance(leaf, PreparedInput) else leaf
        if isinstance(inner, Adapter):
            if inner is not leaf:
                raise InputError(f"{path} prepares the input of its adapter (allowed: inputs as they are)")
            found[path] = inner
    if not found:
        raise InputError("a model without adapters (allowed: one of recipe qlora, loftq or qa-lora before it merges)")
    return found


def base(model: Model) -> Model:
    """The model without its adapters."""

    def one(_: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput):
            return dataclasses.replace(leaf, w=one("", leaf.w))
        return bare(leaf) if isinstance(leaf, Adapter) else leaf

    return model.replace(params=trees.map_leaves(one, model.params))


def export_peft(model: Model, folder: str | Path, base_model: str = "") -> None:
    """Writes the adapters of a model; `base_model` is what `adapter_config.json` names as theirs.

    Raises `InputError` as `adapters_of` does, for ranks or scalings that differ between layers, and when a file cannot
    be written.
    """
    from safetensors.numpy import save_file

    found = adapters_of(model)
    kinds = {(int(a.b.shape[-1]), float(a.scaling)) for a in found.values()}
    if len(kinds) > 1:
        raise InputError(f"adapters of ranks and scalings {sorted(kinds)} (allowed: one of each)")
    ((rank, scaling),) = kinds
    tensors = {}
    for path, a in found.items():
        wide = np.repeat(np.asarray(a.a, np.float32), a.pool, axis=-1)
        tensors[f"base_model.model.{path}.lora_A.weight"] = wide
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.asarray(a.b, np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or model.source,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": _targets(model, found),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(folder / "adapter_model.safetensors") as tmp:
        save_file(tensors, tmp, {"format": "pt"})
    with files.atomic_path(folder / "adapter_config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _targets(model: Model, found: dict[str, Adapter]) -> list[str]:
    """Last names of the modules where all that are called so have an adapter, else whole paths."""
    names = {path.rpartition(".")[2] for path in found}
    called = {p for p, leaf in trees.items(model.params) if not isinstance(leaf, CacheSite)}
    covered = {p for p in called if p.rpartition(".")[2] in names}
    return sorted(names) if covered == set(found) else sorted(found)

"""Folders for the runtimes of vector formats: `aqlm`, `vptq`, `exl3`, `quip`, `qtip` (`lowbit.vq.layouts`)."""

from pathlib import Path

from lowbit.errors import InputError
from lowbit.export.sources import open_sources
from lowbit.formats.base import FormatError
from lowbit.models.hf import HfWriter, write_json, write_tokenizer
from lowbit.models.model import Model
from lowbit.models.shards import atomic_folder
from lowbit.vq.layouts import LAYOUTS, Written

DTYPE = "float16"  # of what is not packed: these runtimes compute in it


def export_layout(source: Model | str | Path, out: str | Path, target: str, drop_activations: bool = False) -> str:
    """Writes a model or a folder as the folder `out` in the layout `target`, one tensor in memory besides the model;
    what is not packed is cast to fp16, whose name is returned.

    Nothing is quantized anew and no code changes. Raises `InputError` before anything is written for a packed weight
    that the layout does not hold, naming it, its format and what is allowed, and for a model without packed weights.
    """
    layout, opened = LAYOUTS[target], open_sources(source, drop_activations)
    packed = {path: (s.format, s.shape) for path, s in opened.tensors.items() if s.format is not None}
    for path, (fmt, shape) in packed.items():
        why = "an embedding is looked up" if path == "model.embed_tokens" else layout.why_not(path, fmt, shape)
        if why:
            raise InputError(f"{path} has format {fmt.name!r}: {why} (allowed with target {target}: {layout.allowed})")
    if not packed:
        raise InputError(f"a model without packed weights (allowed with target {target}: weights in {layout.allowed})")
    linears = [path for path, s in opened.tensors.items() if len(s.shape) == 2 and path != "model.embed_tokens"]
    config = layout.config(packed, [path for path in linears if path not in packed])
    written: dict[str, dict[str, Written]] = {}
    with atomic_folder(out) as tmp:
        writer = HfWriter(tmp, opened.config, DTYPE, packed=False)
        for path, s in opened.tensors.items():
            if path not in packed:
                writer.add(path, s.load())
                continue
            try:
                arrays = layout.tensors(s.load())
            except FormatError as e:
                raise InputError(f"{path}: {e}") from e
            written[path] = {name: (a.shape, str(a.dtype), a.nbytes) for name, a in arrays.items()}
            writer.add_arrays(path, DTYPE, arrays)
        writer.close(config)
        for name, value in layout.files(config, written).items():
            write_json(tmp / name, value)
        write_tokenizer(opened.place, opened.tokenizer, tmp)
    return DTYPE

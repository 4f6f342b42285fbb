"""Hugging Face folders: dequantized for `transformers`, or packed for lowbit itself."""

from pathlib import Path

from lowbit.errors import unknown
from lowbit.export.sources import leaves, open_sources
from lowbit.models.hf import FLOATS, HfWriter, write_tokenizer
from lowbit.models.model import Model
from lowbit.models.shards import atomic_folder


def export_hf(
    source: Model | str | Path,
    out: str | Path,
    packed: bool = False,
    dtype: str | None = None,
    drop_activations: bool = False,
) -> str | None:
    """Writes `config.json`, safetensors and tokenizer of a model or a folder to the folder `out`, one tensor in memory
    besides the model. Returns the dtype that float weights were cast to, None if to none.

    Packed keeps codes, scales and activation formats, and floats as they are. Dequantized decodes every packed weight;
    `dtype` is `bfloat16`, `float16` or `float32`, or None for float32 where a weight is packed (codes times scales are
    exact there) and the stored dtype where none is. Raises `InputError` for what the folder cannot hold.
    """
    if dtype is not None and dtype not in FLOATS:
        raise unknown("dtype", dtype, FLOATS)
    opened = open_sources(source, drop_activations or packed, online=packed)
    if not packed and dtype is None and any(s.format is not None for s in opened.tensors.values()):
        dtype = "float32"
    with atomic_folder(out) as tmp:
        writer = HfWriter(tmp, opened.config, dtype, packed)
        if packed:
            for path, leaf in leaves(source):
                writer.add(path, leaf)
                del leaf  # before the next one is read
        else:
            for path, s in opened.tensors.items():
                writer.add(path, s.load())
        writer.close()
        write_tokenizer(opened.place, opened.tokenizer, tmp)
    return dtype

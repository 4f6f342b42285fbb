"""Hugging Face folders: dequantized for `transformers`, or packed for lowbit itself."""

from pathlib import Path

from lowbit.models.hf import save_hf
from lowbit.models.model import Model


def export_hf(model: Model, out: str | Path, packed: bool = False, dtype: str | None = None) -> None:
    """Writes `config.json`, safetensors and tokenizer to the folder `out`.

    Packed keeps codes, scales and activation formats, and floats as they are. Dequantized decodes every packed weight;
    `dtype` is `bfloat16`, `float16` or `float32`, or None for float32 where a weight is packed (codes times scales are
    exact there) and the stored dtype where none is. Raises `InputError` for what the folder cannot hold.
    """
    save_hf(model, out, dtype=dtype, packed=packed)

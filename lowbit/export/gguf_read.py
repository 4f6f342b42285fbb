"""Reads GGUF files into models: block types become `QTensor`s with the same codes and scales, nothing is requantized.

Takes what `write_gguf` writes and any llama, qwen2, qwen3, gemma2 or gemma3 file with tensors of those types.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.export import gguf_arch as arch
from lowbit.export.gguf_file import GGUFFile, TensorInfo, parse
from lowbit.export.gguf_tokenizer import read_tokenizer
from lowbit.export.gguf_types import FLOAT_DTYPES, Fields, GGMLType, unblock
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.models.model import Model


def read_gguf(path: str | Path) -> Model:
    """The model of a GGUF file. Raises `InputError` for a truncated, corrupt, incomplete or foreign file."""
    f = parse(path)
    shapes = {n: t.shape for n, t in f.tensors.items()}
    factors = None
    if arch.ROPE_FREQS in f.tensors:
        factors = _float(f, arch.ROPE_FREQS)
    try:
        config = arch.read_config(f.kv, shapes, factors)
        tokenizer = read_tokenizer(f.kv)
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except (TypeError, ValueError, ZeroDivisionError) as e:  # a key of the wrong type
        raise InputError(
            f"{path} is corrupt: {str(e).splitlines()[0]} (allowed: metadata as llama.cpp writes it)"
        ) from e
    names = arch.tensor_names(config)
    known = {*names.values(), arch.ROPE_FREQS}
    missing, extra = [n for n in known - {arch.ROPE_FREQS} if n not in f.tensors], sorted(set(f.tensors) - known)
    if missing or extra:
        raise InputError(
            f"{path}: tensors missing {sorted(missing)[:4]}, unknown {extra[:4]} (allowed: those of {config.family})"
        )
    flat = {}
    for p, shape in config.shapes().items():
        info = f.tensors[names[p]]
        if info.shape != shape:
            raise InputError(f"{path}: {info.name} has shape {list(info.shape)} (allowed: {list(shape)})")
        flat[p] = _leaf(f, p, info, config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{path}: {tokenizer.vocab_size} tokens (the embedding has {config.vocab_size} rows)")
    meta = {"format": "gguf", "file_type": f.kv.get("general.file_type")}
    return Model(config, trees.build(flat), tokenizer, str(path), meta)


def _leaf(f: GGUFFile, path: str, info: TensorInfo, config: Any) -> Any:
    if not info.type.quantized:
        x = _float(f, info.name)
        if not np.isfinite(x.astype(np.float32, copy=False)).all():
            raise InputError(f"{f.path}: {info.name} holds NaN or infinite weights (allowed: finite numbers)")
        if config.norm_plus_one and path.endswith("norm"):
            x = x.astype(np.float32) - np.float32(1.0)
        return jnp.asarray(arch.from_file_rows(x, path, config))
    data = arch.from_file_rows(f.read(info.name), path, config)
    try:
        return qtensor(info.type, unblock(info.type, data))
    except InputError as e:
        raise InputError(f"{f.path}: {info.name} holds {e}") from e


def qtensor(t: GGMLType, fields: Fields) -> QTensor:
    """A `QTensor` of the lowbit format of type `t` with these codes and scales. Raises `InputError` for scales that are
    not finite or, in MXFP4, too small for float32."""
    levels, d, m, sc, mn = fields
    if not np.isfinite(d).all() or (m is not None and not np.isfinite(m).all()):
        raise InputError("NaN or infinite scales (allowed: finite numbers)")
    if t.name == "MXFP4":
        least = np.float32(2.0**-126)  # ggml gives blocks of zeros 2^-128, a float32 subnormal; any scale does there
        used = rearrange(levels, "o (g b) -> o g b", b=t.block).any(axis=-1)
        if (used & (d < least)).any():
            raise InputError(f"an MXFP4 scale of {d[used].min():g} (allowed: {least:g} or more)")
        d = np.maximum(d, least)
    fmt: Any = formats.get(t.format)
    two = {"d": d, "sc": sc, "dmin": m, "mn": mn}
    arrays = {
        k: jnp.asarray(a) for k, a in (two if sc is not None else {"scale": d, "min": m}).items() if a is not None
    }
    return QTensor(fmt.pack(jnp.asarray(levels), arrays), fmt, (levels.shape[0], levels.shape[1]), "float32")


def _float(f: GGUFFile, name: str) -> np.ndarray:
    """A float tensor as an array of its own dtype, rows in the file's order."""
    info = f.tensors[name]
    if info.type.quantized:
        raise InputError(f"{f.path}: {name} has type {info.type.name} (allowed: F32, F16, BF16)")
    return f.read(name).reshape(-1).view(FLOAT_DTYPES[info.type.name]).reshape(info.shape)

"""Reads a written GGUF file as others do, to check the writer: nothing in here comes from the writer.

The container, tensor names and dequantizers are the `gguf` library's. Its 0.19 does not know Q2_0 (type 42), for which
this file has a decoder of its own, after the layout in ggml's `ggml-common.h`. The row order of Q and K is undone from
its description: the llama architecture rotates rows 2 i and 2 i + 1 of a head, Hugging Face rows i and i + head / 2.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Q2_0, Q2_0_WEIGHTS, Q2_0_BYTES = 42, 64, 18
PART = 1 << 24  # weights that are decoded at a time


class Reader(gguf.GGUFReader):
    """The library's reader, which puts where tensors of type Q2_0 are into `q2_0`, as `(offset, shape)`, and steps over
    lists of strings: of each string it would keep several arrays, half a GiB for a vocabulary of 128 thousand."""

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        types = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
        if raw_type != types[0] or self._get(orig_offs, np.uint32)[0] != types[1]:
            return super()._get_field_parts(orig_offs, raw_type)
        at, view = int(orig_offs) + 12, memoryview(self.data)
        for _ in range(int(self._get(orig_offs + 4, np.uint64)[0])):
            at += 8 + int.from_bytes(view[at : at + 8], "little")
            if at > len(view):
                raise ValueError(f"a list of strings at {orig_offs} that the file ends in")
        return at - int(orig_offs), [], [], list(types)

    def _build_tensors(self, start_offs: Any, fields: list[Any]) -> None:
        known = [f for f in fields if f.parts[4][0] != Q2_0]
        super()._build_tensors(start_offs, known)
        self.q2_0: dict[str, tuple[int, tuple[int, int]]] = {}
        for f in fields:
            _, name, _, dims, kind, offset = f.parts
            if kind[0] == Q2_0:
                columns, rows = (*dims.tolist(), 1)[:2]
                shape = rows, columns // Q2_0_WEIGHTS * Q2_0_BYTES
                at = start_offs + int(offset[0])
                self._get(at, np.uint8, math.prod(shape)).reshape(shape)  # raises where the file ends
                self.q2_0[bytes(name).decode()] = at, shape


def weights(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[np.ndarray]]]:
    """Yields `(name, type, shape, parts)` for every parameter in `names` (Hugging Face paths, without `.weight`).

    `parts` are its rows in Hugging Face's order as float32, about `PART` weights at a time. They are read from the
    file, not from the library's map of it, whose pages would stay in memory. Raises `ValueError`, `IndexError` or
    `KeyError` for a file that cannot be read.
    """
    reader = Reader(path)
    arch = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{arch}.block_count"].contents()
    head = reader.fields[f"{arch}.attention.key_length"].contents()
    kind = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
    stored = gguf.get_tensor_name_map(kind, layers)
    tensors = {t.name: t for t in reader.tensors}
    for name in names:
        full = name if name.endswith(".bias") else name + ".weight"
        where = stored.get_name(full, try_suffixes=(".weight", ".bias"))
        if where in reader.q2_0:
            type, dtype, (offset, shape) = "Q2_0", np.dtype(np.uint8), reader.q2_0[where]
            columns = shape[1] // Q2_0_BYTES * Q2_0_WEIGHTS
        else:
            t = tensors[where]
            type, dtype, offset, shape = t.tensor_type.name, t.data.dtype, t.data_offset, t.data.shape
            columns = int(t.shape[0]) if len(shape) > 1 else 1
        turned = head if arch == "llama" and where.split(".")[-2] in ("attn_q", "attn_k") else 0
        found = (shape[0], columns) if len(shape) > 1 else shape
        yield (
            name,
            type,
            found,
            _parts(path, type, dtype, offset, shape, max(1, PART // columns // head) * head, turned),
        )


def _parts(
    path: str | Path, type: str, dtype: np.dtype, offset: int, shape: tuple[int, ...], step: int, head: int
) -> Iterator[np.ndarray]:
    """`step` rows at a time of a tensor at `offset`; `head` is its head size where a head's halves are interleaved."""
    width = math.prod(shape[1:])
    for first in range(0, shape[0], step):
        n = min(step, shape[0] - first)
        data = np.fromfile(path, dtype, n * width, offset=offset + first * width * dtype.itemsize)
        x = dequantize(type, data.reshape(n, *shape[1:])).astype(np.float32, copy=False)
        yield x[halves(n, head)] if head else x


def halves(rows: int, head: int) -> np.ndarray:
    """For each row in Hugging Face's order, where the file has it: a head's even rows, then its odd ones."""
    return np.concatenate(
        [np.r_[first : first + head : 2, first + 1 : first + head : 2] for first in range(0, rows, head)]
    )


def q2_0(data: np.ndarray) -> np.ndarray:
    """float32 `[rows, columns]` of Q2_0 rows: per 64 weights an fp16 scale and 16 bytes, weight `i` at bits
    `2 (i mod 4)` of byte `i // 4`, worth `(code - 1) * scale`."""
    block = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
    blocks = np.ascontiguousarray(data).view(block)
    i = np.arange(Q2_0_WEIGHTS)
    codes = blocks["codes"][..., i // 4] >> (2 * (i % 4)).astype(np.uint8) & 3
    return ((codes.astype(np.float32) - 1) * blocks["d"].astype(np.float32)[..., None]).reshape(len(data), -1)


def dequantize(type: str, data: np.ndarray) -> np.ndarray:
    """float32 weights of the rows' bytes of a type."""
    return q2_0(data) if type == "Q2_0" else gguf.dequantize(data, gguf.GGMLQuantizationType[type])

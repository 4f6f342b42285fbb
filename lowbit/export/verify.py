"""Reads a written GGUF file as others do, to check the writer: nothing in here comes from the writer.

The container, tensor names and dequantizers are the `gguf` library's. Its 0.19 does not know Q2_0 (type 42), for which
this file has a decoder of its own, after the layout in ggml's `ggml-common.h`. The row order of Q and K is undone from
its description: the llama architecture rotates rows 2 i and 2 i + 1 of a head, Hugging Face rows i and i + head / 2.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Q2_0, Q2_0_WEIGHTS, Q2_0_BYTES = 42, 64, 18


class Reader(gguf.GGUFReader):
    """The library's reader, which leaves tensors of type Q2_0 in `q2_0` as bytes `[rows, row bytes]` and steps over
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
        self.q2_0: dict[str, np.ndarray] = {}
        for f in fields:
            _, name, _, dims, kind, offset = f.parts
            if kind[0] == Q2_0:
                columns, rows = (*dims.tolist(), 1)[:2]
                width = columns // Q2_0_WEIGHTS * Q2_0_BYTES
                data = self._get(start_offs + int(offset[0]), np.uint8, rows * width)
                self.q2_0[bytes(name).decode()] = data.reshape(rows, width)


def weights(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields `(name, type, float32 weights)` for every parameter in `names` (Hugging Face paths, without `.weight`),
    one in memory at a time, its rows in Hugging Face's order. Raises `ValueError`, `IndexError` or `KeyError` for a
    file that cannot be read."""
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
            type, x = "Q2_0", q2_0(reader.q2_0[where])
        else:
            t = tensors[where]
            type, x = t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        if arch == "llama" and where.split(".")[-2] in ("attn_q", "attn_k"):
            x = x[halves(len(x), head)]
        yield name, type, x


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

"""Parses the GGUF container (versions 2 and 3, little-endian): metadata and where each tensor lies.

The file written by `gguf` is checked by `verify`, not with this. Every length is checked against the file before
it is used, so a truncated or corrupt file gives one `InputError`.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import InputError
from lowbit.export.gguf_types import BY_ID, GGMLType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """`shape` is outermost first (rows, columns); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """Metadata `kv` and tensors of a file; `read` gives a tensor's bytes."""

    path: Path
    kv: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Bytes of a tensor, uint8 `[rows, row bytes]` (`[1, bytes]` for one dimension)."""
        t = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, t.nbytes, offset=t.offset)
        return data.reshape(math.prod(t.shape[:-1]), -1)


class _Reader:
    def __init__(self, path: Path):
        self.path, self.size, self.at = path, path.stat().st_size, 0
        self.data = np.memmap(path, np.uint8, "r") if self.size else np.zeros(0, np.uint8)

    def take(self, n: int, what: str) -> bytes:
        if n < 0 or self.at + n > self.size:
            raise InputError(
                f"{self.path} is truncated or corrupt: {what} needs {n} bytes at {self.at} (the file has {self.size})"
            )
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("utf-8", "surrogateescape")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            inner, n = self.number("I", key), self.number("Q", key)
            if inner in _SCALARS:
                raw = self.take(n * struct.calcsize("<" + _SCALARS[inner]), key)
                return np.frombuffer(raw, "<" + _SCALARS[inner]).tolist()
            if inner == _STRING and n <= self.size:
                return [self.string(key) for _ in range(n)]
            raise InputError(
                f"{self.path} is corrupt: {key} is an array of {n} values of type {inner} (allowed: 0-8, 10-12)"
            )
        if kind not in _SCALARS:
            raise InputError(f"{self.path} is corrupt: {key} has value type {kind} (allowed: 0 to 12)")
        return self.number(_SCALARS[kind], key)


def parse(path: str | Path) -> GGUFFile:
    """Metadata and tensor table of a file. Raises `InputError` for what is no whole GGUF file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no GGUF file {path} (allowed: an existing .gguf file)")
    r = _Reader(path)
    if r.take(4, "the header") != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it begins with {r.data[:4].tobytes()!r} (allowed: b'GGUF')")
    version = r.number("I", "the header")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} (allowed: 2, 3, little-endian)")
    n_tensors, n_kv = r.number("Q", "the header"), r.number("Q", "the header")
    if max(n_tensors, n_kv) > r.size:
        raise InputError(
            f"{path} is corrupt: it claims {n_tensors} tensors and {n_kv} keys (the file has {r.size} bytes)"
        )
    kv: dict[str, Any] = {}
    for _ in range(n_kv):
        key = r.string("a metadata key")
        kv[key] = r.value(r.number("I", key), key)
    rows = [_info(r) for _ in range(n_tensors)]
    align = kv.get("general.alignment", 32)
    if not isinstance(align, int) or align <= 0 or align % 8:
        raise InputError(f"{path}: general.alignment {align!r} (allowed: a multiple of 8)")
    start = -(-r.at // align) * align
    tensors = {}
    for name, shape, kind, offset in rows:
        if kind not in BY_ID:
            known = ", ".join(f"{t.name} {t.id}" for t in BY_ID.values())
            raise InputError(f"{path}: tensor {name} has GGML type {kind} (allowed: {known})")
        t = TensorInfo(name, shape, BY_ID[kind], start + offset)
        if shape[-1] % t.type.block:
            raise InputError(f"{path}: {name} {list(shape)} has no whole {t.type.name} blocks of {t.type.block}")
        if offset % align or t.offset + t.nbytes > r.size:
            raise InputError(
                f"{path} is truncated or corrupt: {name} needs {t.nbytes} bytes at {t.offset} (the file has {r.size})"
            )
        tensors[name] = t
    if len(tensors) != len(rows):
        raise InputError(f"{path} is corrupt: two tensors have the same name (allowed: distinct names)")
    return GGUFFile(path, kv, tensors)


def _info(r: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = r.string("a tensor name")
    dims = r.number("I", name)
    if not 1 <= dims <= _MAX_DIMS:
        raise InputError(f"{r.path} is corrupt: tensor {name!r} has {dims} dimensions (allowed: 1 to {_MAX_DIMS})")
    shape = tuple(r.number("Q", name) for _ in range(dims))[::-1]  # the file has the innermost first
    return name, shape, r.number("I", name), r.number("Q", name)

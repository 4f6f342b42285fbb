"""Safetensors folders, read and written one tensor at a time.

Tensors are read with plain file reads rather than `mmap`: pages of a map count as resident, so a walk through a mapped
checkpoint would look, and be billed, like holding all of it. Peak memory here is one tensor.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lowbit.errors import InputError, unknown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(t)
    for name, t in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
CODES = {dtype: name for name, dtype in DTYPES.items()}


class Shards:
    """The tensors of a folder with `model.safetensors`, or with an index and its shards.

    Opening reads headers only and checks that every file is as long as its header says. Raises `InputError`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._where: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index} has no 'weight_map' (needed: tensor name to file)")
            for name in sorted(set(map(str, weight_map.values()))):
                if Path(name).name != name or not (self.folder / name).is_file():
                    raise InputError(f"{index} names the shard {name!r}, which is not in the folder")
                self._open(self.folder / name)
            lost = sorted(set(weight_map) - set(self._where))
            if lost:
                raise InputError(f"{index}: tensors that no shard holds: {some(lost)}")
        elif (self.folder / SINGLE).is_file():
            self._open(self.folder / SINGLE)
        else:
            raise InputError(f"no weights in {self.folder} (allowed: {SINGLE}, or {INDEX} with its shards)")

    def _open(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little") if size >= 8 else 0
            if size < 8 or n > MAX_HEADER_BYTES or 8 + n > size:
                raise InputError(f"{path} is truncated or no safetensors file: {size} bytes, header of {n}")
            try:
                header = json.loads(f.read(n))
                header.pop("__metadata__", None)
                entries = {k: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()}
                ends = [8 + n + int(e[3]) for e in entries.values()]
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
                raise InputError(f"{path} has a corrupt safetensors header: {e}") from e
        if max(ends, default=size) != size:
            raise InputError(f"{path} is truncated or damaged: {size} bytes (its header needs {max(ends)})")
        for name, (code, shape, begin, end) in entries.items():
            if code not in DTYPES:
                raise unknown(f"dtype of {name} in {path.name}", code, DTYPES)
            if end - begin != math.prod(shape) * DTYPES[code].itemsize or begin < 0:
                raise InputError(f"{path}: {name} has {end - begin} bytes (its shape {list(shape)} of {code} differs)")
            if name in self._where:
                raise InputError(f"tensor {name} is in {self._where[name][0].name} and in {path.name}")
            self._where[name] = (path, DTYPES[code], shape, 8 + n + begin)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._where[name][2]

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor, from the header."""
        return self._where[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied into memory. Raises `InputError` when a float tensor holds NaN or infinity."""
        path, dtype, shape, offset = self._where[name]
        a = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
        require_finite(a, name, path)
        return a


class ShardWriter:
    """Writes tensors as they come into `folder`, starting a new shard before `max_bytes` is exceeded.

    A safetensors header precedes its data but is known only at the end, so each shard's data is
    spooled to a file first.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._done: list[tuple[Path, dict[str, Any], int]] = []
        self._begin()

    def _begin(self) -> None:
        self._spool = self.folder / f".spool{len(self._done)}"
        self._spool.touch()
        self._header: dict[str, Any] = {}

    def _end(self) -> None:
        self._done.append((self._spool, self._header, self._size))

    @property
    def _size(self) -> int:
        return max((e["data_offsets"][1] for e in self._header.values()), default=0)

    def add(self, name: str, a: np.ndarray) -> None:
        """Appends one tensor."""
        if self._header and self._size + a.nbytes > self.max_bytes:
            self._end()
            self._begin()
        begin = self._size
        entry = {"dtype": CODES[a.dtype], "shape": list(a.shape), "data_offsets": [begin, begin + a.nbytes]}
        self._header[name] = entry
        with open(self._spool, "ab") as f:  # nothing stays open if the next tensor is refused
            f.write(np.ascontiguousarray(a).view(np.uint8).data if a.ndim else a.tobytes())

    def close(self) -> None:
        """Puts headers before the data; with more than one shard also writes the index."""
        self._end()
        total, weight_map = len(self._done), {}
        for i, (spool, header, _) in enumerate(self._done):
            name = SINGLE if total == 1 else f"model-{i + 1:05}-of-{total:05}.safetensors"
            weight_map |= dict.fromkeys(header, name)
            text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with open(self.folder / name, "wb") as f, open(spool, "rb") as data:
                f.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(data, f, 1 << 24)
            spool.unlink()
        if total > 1:
            index = {"metadata": {"total_size": sum(n for *_, n in self._done)}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill; on success its files move into `folder`, `config.json` last.

    Model files that were there and are not among the new ones (old shards, an old index) are removed; other files stay.
    On failure nothing in `folder` has changed. Raises `InputError` when it cannot be written.
    """
    folder = Path(folder)
    tmp = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        yield tmp
        new = sorted(tmp.iterdir(), key=lambda p: p.name == "config.json")
        for p in new:
            with open(p, "rb+") as f:
                os.fsync(f.fileno())
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)  # until the new one is there, the folder is no model
        for old in [*folder.glob("*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
        for p in new:
            os.replace(p, folder / p.name)
    except OSError as e:
        raise InputError(f"cannot write {folder}: {e.strerror or e}") from e
    finally:
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)


def require_finite(a: np.ndarray, name: str, where: object) -> None:
    """Raises `InputError` when a float array holds NaN or infinity; looks at four million elements at a time."""
    if a.dtype.kind in "iub" or a.dtype == DTYPES["F8_E8M0"]:
        return
    flat = a.reshape(-1)
    for i in range(0, flat.size, 1 << 22):
        part = flat[i : i + (1 << 22)]
        if not np.isfinite(part).all():
            bad = int(np.count_nonzero(~np.isfinite(part)))
            raise InputError(f"{where}: {name} holds {bad} or more NaN or infinite values (allowed: finite numbers)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `InputError` when the file is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {path.name} in {path.parent} (needed to read a model)") from None
    except (ValueError, OSError) as e:
        raise InputError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} (allowed: a JSON object)")
    return value


def some(names: list[str]) -> str:
    """Up to three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

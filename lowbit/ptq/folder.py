"""Quantizing a Hugging Face folder block by block: what every solver's `quantize_dir` has in common.

Each block (the embedding, a layer, the last norm, the head) becomes one shard, which is kept in `.NAME.partial` beside
the result until all are there; after an interruption the same call goes on behind the last whole one.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from lowbit.errors import InputError
from lowbit.formats import adapter
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.formats.kv import KVFormat
from lowbit.linalg.online import restore
from lowbit.models import cache as caches
from lowbit.models import hf
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.models.hf import HfWriter, tensor_name
from lowbit.models.shards import INDEX, SINGLE, Shards, atomic_folder

NO_LIMIT = 1 << 62
LEAVES = "leaves.json"
Block = Mapping[str, Callable[[], Any]]  # {path: function that reads the leaf}, consecutive parameters


@runtime_checkable
class SolveBlock(Protocol):
    """A solver at work on a model, given its blocks in order."""

    def solve(self, block: Block) -> Iterable[tuple[str, Any]]:
        """The block's parameters, in order, as they are to be stored."""
        ...

    def passed(self, block: Block) -> None:
        """Takes note of a block that an earlier call solved; the functions read what it stored."""
        ...


def blocks_of(readers: Block) -> list[Block]:
    """Consecutive parameters of one layer, and what lies before and after the layers."""
    out: dict[str, dict[str, Any]] = {}
    for path, read in readers.items():
        m = re.match(r"model\.layers\.\d+\.", path)
        out.setdefault(m[0] if m else path, {})[path] = read
    return list(out.values())


def quantize_folder(
    src: Path,
    out: Path,
    solver: SolveBlock,
    assignment: Mapping[str, Any],
    key: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs `solver` over the blocks of the folder `src` into the packed folder `out`.

    Of the `assignment` only cache formats are attached here, the rest is the solver's. `key` is all else that the
    result depends on besides `src`, as JSON values: another one, or another source or assignment, starts anew.
    `progress(done, total)` counts blocks. Raises `InputError`; `out` then holds what it held before.
    """
    config = hf.load_config(src)
    readers = dict(hf.readers(src))
    for path, fmt in assignment.items():
        if isinstance(fmt, KVFormat):
            readers[path] = partial(_cache_site, readers.get(path, CacheSite), fmt, config.head_dim)
    blocks = blocks_of(readers)
    state = out.with_name(f".{out.name}.partial")
    plan = {site: fmt.name for site, fmt in assignment.items()}
    here = state / _fingerprint(src, {**key, "plan": plan})
    try:
        if state.is_dir() and not here.is_dir():
            shutil.rmtree(state)
        here.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write {state}: {e.strerror or e}") from e
    for n, block in enumerate(blocks):
        done = here / f"{n:05}"
        if done.is_dir():
            solver.passed(stored_block(done, config))
        else:
            write_block(done, config, solver.solve(block))
        if progress is not None:
            progress(n + 1, len(blocks))
    with atomic_folder(out) as tmp:
        _assemble(src, config, [here / f"{n:05}" for n in range(len(blocks))], tmp)
    shutil.rmtree(state)


def _cache_site(read: Callable[[], CacheSite], fmt: KVFormat, head_dim: int) -> CacheSite:
    site = dataclasses.replace(read(), format=fmt)
    site.check(head_dim)
    return site


def _fingerprint(src: Path, key: Mapping[str, Any]) -> str:
    """Of the configuration, of every shard's size, time and header, and of `key`."""
    h = hashlib.sha256((src / "config.json").read_bytes())
    for path in sorted(src.glob("*.safetensors")):
        stat = path.stat()
        with open(path, "rb") as f:
            header = f.read(int.from_bytes(f.read(8), "little"))
        h.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + header)
    h.update(json.dumps(key, sort_keys=True).encode())
    return h.hexdigest()[:16]


def write_block(done: Path, config: ModelConfig, leaves: Iterable[tuple[str, Any]], **more: Any) -> None:
    """One block's leaves as the folder `done`: a shard and what its leaves are, whole or not at all. `more` are JSON
    values that go beside them (see `block_facts`)."""
    tmp = done.with_suffix(".tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        writer = HfWriter(tmp, config, None, packed=True, max_shard_bytes=NO_LIMIT)
        for path, leaf in leaves:
            writer.add(path, leaf)
            del leaf  # before the next one is read
        writer.shards.close()
        kinds = {"formats": writer.formats, "dtypes": writer.dtypes, "seen": writer.seen, "caches": writer.caches}
        kinds |= writer.names | {"adapters": writer.adapters} | more
        (tmp / LEAVES).write_text(json.dumps(kinds))
        for path in tmp.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(tmp, done)
    except OSError as e:
        raise InputError(f"cannot write {done}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def block_facts(done: Path) -> dict[str, Any]:
    """What `write_block` wrote beside the arrays."""
    return json.loads((done / LEAVES).read_text())


def stored_block(done: Path, config: ModelConfig) -> Block:
    """Readers of a block that `write_block` wrote."""
    shards, kinds, shapes = Shards(done), block_facts(done), config.shapes()
    plain = {tensor_name(path) for path in kinds["seen"]}

    def read(path: str) -> Any:
        own = [n for n in shards if n.startswith(f"{path}.") and n not in plain]
        arrays = {n.removeprefix(f"{path}."): jnp.asarray(shards.read(n)) for n in own}
        if path in kinds["caches"]:
            return caches.restore(kinds["caches"][path], arrays)
        inputs = {k: arrays.pop(k) for k in list(arrays) if k.startswith(("input.", "online."))}
        factors = {k: arrays.pop(k) for k in adapter.ARRAYS if k in arrays}
        if path in kinds["formats"]:
            out, inner = shapes[path]
            fmt = formats.get(kinds["formats"][path])
            leaf: Any = QTensor(arrays, fmt, (out, inner), kinds["dtypes"][path])
        else:
            leaf = shards.read(tensor_name(path))
        leaf = adapter.restore(leaf, kinds["adapters"].get(path), factors)
        return restore(leaf, {k: kinds[k][path] for k in ("input", "online") if path in kinds[k]}, inputs)

    return {path: partial(read, path) for path in (*kinds["seen"], *kinds["caches"])}


@dataclasses.dataclass
class _Finished:
    """Stands in for `HfWriter`'s shards: they have been written, and `close` links them into the new folder."""

    blocks: list[Path]
    folder: Path

    def close(self) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for n, block in enumerate(self.blocks):
            name = f"model-{n + 1:05}-of-{len(self.blocks):05}.safetensors"
            os.link(block / SINGLE, self.folder / name)
            with open(self.folder / name, "rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            header.pop("__metadata__", None)
            weight_map |= dict.fromkeys(header, name)
            total += max((e["data_offsets"][1] for e in header.values()), default=0)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def _assemble(src: Path, config: ModelConfig, blocks: list[Path], tmp: Path) -> None:
    """Configuration, index and tokenizer around the finished shards."""
    writer = HfWriter(tmp, config, None, packed=True)
    writer.shards = _Finished(blocks, tmp)  # type: ignore[assignment]
    for block in blocks:
        kinds = block_facts(block)
        writer.formats |= kinds["formats"]
        writer.dtypes |= kinds["dtypes"]
        writer.seen |= kinds["seen"]
        writer.caches |= kinds["caches"]
        writer.adapters |= kinds["adapters"]
        for kind, names in writer.names.items():
            names |= kinds[kind]
    writer.close()
    for name in hf.TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, tmp / name)

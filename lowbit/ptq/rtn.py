"""Round to nearest: every weight takes the nearest code of its format, whose parameters are fitted to it alone.

No data and no error feedback; the baseline of every other solver. `quantize` works on a parameter tree in memory,
`quantize_dir` goes through a Hugging Face folder block by block and resumes where it was interrupted.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Latent, Params, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.hf import HfWriter, iter_tensors, tensor_name
from lowbit.models.shards import INDEX, ShardWriter, atomic_folder
from lowbit.plan import INPUT, Plan
from lowbit.ptq.base import Solver, register
from lowbit.tree import Tree

NO_LIMIT = 1 << 62


def encode(fmt: Format, w_OI: Any) -> QTensor:
    """`fmt.encode` in one compiled program, of the weight in float32: decoding then gives codes times scales exactly,
    with no rounding to the dtype that `w` had. Raises `FormatError` like `Format.encode`."""
    w = jnp.asarray(w_OI)
    fmt.check(w.shape)
    q, params = _encode(fmt, w)
    fmt.check_values(w, params)
    return q


@partial(jax.jit, static_argnames="fmt")
def _encode(fmt: Format, w: Float[Array, "O I"]) -> tuple[QTensor, Params]:
    w32 = w.astype(jnp.float32)
    params = fmt.fit_block(w32)  # the hook of every solver: here one block is the whole matrix
    codes, _ = fmt.round_block(w32, params)
    return QTensor(fmt.pack(codes, fmt.stored(params)), fmt, w.shape, "float32"), params


def quantize(params: Tree, assignment: Mapping[str, Any]) -> Tree:
    """`params` with each weight named in `assignment` (`Plan.resolve`) packed in its format; `path:in` entries
    attach the activation format. Weights that are packed already, and paths that do not exist, raise `InputError`."""
    paths = {p for p, _ in trees.items(params)}
    if stray := sorted(s for s in assignment if s.removesuffix(INPUT) not in paths):
        raise InputError(f"format for {stray[0]!r}, which is no weight (allowed: {', '.join(sorted(paths)[:3])}, ...)")
    return trees.map_leaves(lambda path, leaf: quantize_leaf(path, leaf, assignment), params)


def quantize_leaf(path: str, leaf: Any, assignment: Mapping[str, Any]) -> Any:
    """One parameter of `quantize`; the online transform of its input stays."""
    fmt, act = assignment.get(path), assignment.get(path + INPUT)
    prepared = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
    w = prepared.w
    if (fmt is not None and isinstance(w, QTensor | Latent)) or (prepared.act is not None and (fmt or act) is not None):
        raise InputError(f"{path} is quantized already (allowed: float weights; nothing is quantized twice)")
    if fmt is not None:
        w = encode(fmt, w)
    if act is None:
        return dataclasses.replace(leaf, w=w) if isinstance(leaf, PreparedInput) else w
    return dataclasses.replace(prepared, w=w, act=act)


# -- folders ----------------------------------------------------------------------------------------------------------


def quantize_dir(
    src: str | Path,
    plan: Plan | Mapping[str, Any],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantizes the folder `src` into the packed folder `out`, with one tensor and its codes in memory at a time.

    Each block becomes one shard, which is kept in `.NAME.partial` beside `out` until all are there; after an
    interruption the same call goes on behind the last whole shard. A different source or plan starts anew.
    `progress(done, total)` counts blocks. Raises `InputError`; `out` then holds what it held before.
    """
    src, out = Path(src), Path(out)
    config = hf.load_config(src)
    kinds = hf.stored_kinds(src)
    assignment = plan.resolve(config.shapes()) if isinstance(plan, Plan) else dict(plan)
    blocks = _blocks(kinds)
    state = out.with_name(f".{out.name}.partial")
    print_ = _fingerprint(src, assignment)
    try:
        if state.is_dir() and (not (state / print_).is_dir()):
            shutil.rmtree(state)
        (state / print_).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write {state}: {e.strerror or e}") from e
    for n, paths in enumerate(blocks):
        shard = state / print_ / f"{n:05}.safetensors"
        if not shard.exists():
            _write_block(src, set(paths), assignment, shard)
        if progress is not None:
            progress(n + 1, len(blocks))
    with atomic_folder(out) as tmp:
        _assemble(src, config, kinds, assignment, state / print_, len(blocks), tmp)
    shutil.rmtree(state)


def _blocks(paths: Mapping[str, Any]) -> list[list[str]]:
    """Consecutive parameters of one layer, and what lies before and after the layers."""
    out: dict[str, list[str]] = {}
    for path in paths:
        m = re.match(r"model\.layers\.\d+\.", path)
        out.setdefault(m[0] if m else path, []).append(path)
    return list(out.values())


def _fingerprint(src: Path, assignment: Mapping[str, Any]) -> str:
    """Of the configuration, of every shard's size, time and header, and of the plan."""
    h = hashlib.sha256((src / "config.json").read_bytes())
    for path in sorted(src.glob("*.safetensors")):
        stat = path.stat()
        with open(path, "rb") as f:
            header = f.read(int.from_bytes(f.read(8), "little"))
        h.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + header)
    h.update(json.dumps({site: fmt.name for site, fmt in assignment.items()}, sort_keys=True).encode())
    return h.hexdigest()[:16]


def _write_block(src: Path, paths: set[str], assignment: Mapping[str, Any], shard: Path) -> None:
    """One block's leaves as `shard`, whole or not at all."""
    tmp = shard.with_suffix(".tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        writer = ShardWriter(tmp, NO_LIMIT)
        weights_only = {s: f for s, f in assignment.items() if not s.endswith(INPUT)}
        for path, leaf in iter_tensors(src, paths.__contains__):
            q = quantize_leaf(path, leaf, weights_only)
            if isinstance(q, QTensor):
                for name, a in q.arrays.items():
                    writer.add(f"{path}.{name}", jax.device_get(a))
            else:
                writer.add(tensor_name(path), q)
            del leaf, q  # before the next one is read
        writer.close()
        with open(tmp / "model.safetensors", "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp / "model.safetensors", shard)
    except OSError as e:
        raise InputError(f"cannot write {shard}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@dataclasses.dataclass
class _Finished:
    """Stands in for `HfWriter`'s shards: they have been written, and `close` links them into the new folder."""

    state: Path
    count: int
    folder: Path

    def close(self) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for n in range(self.count):
            name = f"model-{n + 1:05}-of-{self.count:05}.safetensors"
            os.link(self.state / f"{n:05}.safetensors", self.folder / name)
            with open(self.folder / name, "rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            header.pop("__metadata__", None)
            weight_map |= dict.fromkeys(header, name)
            total += max((e["data_offsets"][1] for e in header.values()), default=0)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def _assemble(
    src: Path, config: Any, kinds: Mapping[str, Any], assignment: Mapping[str, Any], state: Path, count: int, tmp: Path
) -> None:
    """Configuration, index and tokenizer around the finished shards."""
    writer = HfWriter(tmp, config, None, packed=True)
    writer.shards = _Finished(state, count, tmp)  # type: ignore[assignment]
    for path, kind in kinds.items():
        fmt = assignment.get(path)
        writer.seen[path] = "float32" if fmt is not None else str(kind)
        if fmt is not None:
            writer.formats[path], writer.dtypes[path] = fmt.name, "float32"
        if path + INPUT in assignment:
            writer.names["input"][path] = assignment[path + INPUT].name
    writer.close()
    for name in hf.TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, tmp / name)


register(Solver("rtn", lambda model, assignment, documents=None: quantize(model.params, assignment), quantize_dir))

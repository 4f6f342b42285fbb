"""What a teacher says about training rows, computed once: the K most probable tokens of each position.

Of row r and position t a folder keeps the ids of the K tokens, their log-probabilities at the temperature of the loss,
and behind those the log of what all other tokens have together (none if K is the vocabulary). That is `coarse` of
`lowbit.train.objective`, in which the loss `coarse_kl` is stated. Rows have the global index of `lowbit.data.rows`, so
that any seed, batch size and recipe reads what one run wrote.

    teacher_ids.npy   [rows, seq_len, K]     uint16, uint32 beyond 65,536 tokens
    teacher_logp.npy  [rows, seq_len, K+1]   float16 or float32; [..., K] if K is the vocabulary
    done.npy          [rows]                 uint8, 1: the row is there

The files are sparse: rows that no run asked for take no room. A row is marked once it is on the disk, so that after an
interruption the next call computes what is missing. One process writes.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.data.rows import Rows
from lowbit.errors import InputError
from lowbit.files import write_text
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import head, hidden_states
from lowbit.models.model import Model
from lowbit.train.config import TrainConfig
from lowbit.train.objective import coarse
from lowbit.tree import Tree

VERSION = 1
LEAST = -6e4  # logarithms of less are stored as this: float16 has it, and its exponential is 0
Values = Literal["float16", "float32"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one position is stored."""

    vocab: int
    k: int
    values: Values = "float16"  # dtype of logp

    def arrays(self) -> dict[str, tuple[int, np.dtype]]:
        """`{name in a batch: (entries, dtype)}` of a position."""
        ids = np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")
        return {
            "teacher_ids": (self.k, ids),
            "teacher_logp": (self.k + (self.k < self.vocab), np.dtype(self.values)),
        }

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one position."""
        return sum(n * dtype.itemsize for n, dtype in self.arrays().values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds. Two folders with equal manifests have equal rows, as far as they have them."""

    version: int
    teacher: str  # Model.fingerprint
    tokenizer: str  # Tokenizer.hash
    vocab: int
    k: int
    temperature: float
    compute: str  # dtype that the teacher computed in
    values: Values
    rows: dict[str, Any] = dataclasses.field(default_factory=dict)  # the `lowbit.data.rows.Manifest`

    @property
    def layout(self) -> Layout:
        return Layout(self.vocab, self.k, self.values)


def describe(teacher: Model, tokenizer: str, k: int, config: TrainConfig, values: Values = "float16") -> Manifest:
    """The manifest of this teacher and the hash of the tokenizer of the rows, as yet without rows. Raises `InputError`
    unless 1 <= k <= the vocabulary."""
    vocab = teacher.config.vocab_size
    check_k(k, vocab)
    return Manifest(VERSION, teacher.fingerprint(), tokenizer, vocab, k, config.temperature, config.dtype, values)


def check_k(k: int, vocab: int) -> None:
    """Raises `InputError` unless 1 <= k <= vocab."""
    if not 1 <= k <= vocab:
        raise InputError(f"teacher_top_k is {k} (allowed: 1 to the teacher's vocabulary, {vocab})")


def check(folder: str | Path, manifest: Manifest) -> bool:
    """Whether the folder holds a cache. Raises `InputError` when it holds something else, and names what differs; rows
    are compared if the manifest has any."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        if folder.is_dir() and (other := sorted(p.name for p in folder.iterdir() if p.suffix != ".npy")):
            raise InputError(f"{folder} holds {other[0]} (allowed: a teacher cache, or an empty folder)")
        return False
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is damaged: {e} (allowed: a teacher cache, or an empty folder)") from e
    want = json.loads(json.dumps(dataclasses.asdict(manifest)))
    rows = {f"text: {k}": v for k, v in want.pop("rows").items()}
    have = dict(found) | {f"text: {k}": v for k, v in found.get("rows", {}).items()}
    for key, value in (want | rows).items():
        if have.get(key) != value:
            raise InputError(
                f"teacher cache {folder} is of another {key}: {_short(have.get(key))} (allowed: {_short(value)}, or "
                "another folder)"
            )
    return True


class TeacherCache:
    """A folder of what a teacher says about rows, made on first use."""

    def __init__(self, folder: str | Path, manifest: Manifest, rows: Rows):
        """Raises `InputError` for a folder that holds something else."""
        self.folder, self.rows = Path(folder), rows
        self.manifest = dataclasses.replace(manifest, rows=dataclasses.asdict(rows.manifest))
        if not check(folder, self.manifest):
            self._create()
        self._arrays = {name: self._map(name, *self._files()[name]) for name in self._files()}

    def _files(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """`{name: (shape, dtype)}`; of what a batch gets, and which rows are there."""
        n, T = self.manifest.rows["rows"], self.manifest.rows["seq_len"]
        files = {name: ((n, T, entries), dtype) for name, (entries, dtype) in self.manifest.layout.arrays().items()}
        return files | {"done": ((n,), np.dtype(np.uint8))}

    def missing(self, indices: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
        """Those of the rows that are not there yet, each once, ascending."""
        indices = np.unique(indices)
        return indices[self._arrays["done"][indices] == 0]

    def fill(
        self,
        indices: Int[np.ndarray, " N"],
        teacher: Model,
        batch_size: int = 8,
        on_rows: Callable[[int, int], None] | None = None,
    ) -> int:
        """Computes what is missing of these rows, `batch_size` at a time, and returns how many that were.

        `on_rows(done, all)` is called after each batch. Raises `InputError` when the disk is full; what is whole stays.
        """
        missing = self.missing(indices)
        m = self.manifest
        for a in range(0, len(missing), batch_size):
            chosen = missing[a : a + batch_size]
            batch = self.rows.take(np.resize(chosen, batch_size))  # always full, so that there is one program
            tokens, segments = (jnp.asarray(batch[k][:, :-1]) for k in ("tokens", "segments"))
            found = _top(
                teacher.params, tokens, segments, teacher.config, m.k, jnp.float32(m.temperature), jnp.dtype(m.compute)
            )
            ids, logp = (np.asarray(a)[: len(chosen)] for a in found)
            try:
                self._write("teacher_ids", chosen, ids)
                self._write("teacher_logp", chosen, np.maximum(logp, LEAST))
                self._write("done", chosen, np.ones(len(chosen)))
            except OSError as e:
                raise InputError(f"cannot write teacher cache {self.folder}: {e.strerror or e}") from e
            if on_rows is not None:
                on_rows(a + len(chosen), len(missing))
        return len(missing)

    def take(self, indices: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
        """`teacher_ids [N, T, K]` and `teacher_logp [N, T, K+1]` of rows, for a batch. Raises `InputError` for rows
        that are not there."""
        if len(lacking := self.missing(indices)):
            raise InputError(f"teacher cache {self.folder} has no row {lacking[0]} (allowed: rows that were filled)")
        return {name: np.asarray(self._arrays[name][indices]) for name in self.manifest.layout.arrays()}

    # -- files --------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, (shape, dtype) in self._files().items():
                np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, shape).flush()
        except OSError as e:
            raise InputError(f"cannot write teacher cache {self.folder}: {e.strerror or e}") from e
        # Last: with it, the files are whole.
        write_text(self.folder / "manifest.json", json.dumps(dataclasses.asdict(self.manifest), indent=2) + "\n")

    def _map(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        path = self.folder / f"{name}.npy"
        try:
            found = np.lib.format.open_memmap(path, "r")
        except (OSError, ValueError) as e:
            raise InputError(f"{path} is damaged: {e} (allowed: as its manifest says)") from e
        if found.shape != shape or found.dtype != dtype:
            have = f"{list(found.shape)} {found.dtype}"
            raise InputError(f"{path} holds {have} (allowed: {list(shape)} {dtype}, as its manifest says)")
        return found

    def _write(self, name: str, indices: np.ndarray, rows: np.ndarray) -> None:
        """By the file, not by the map: a full disk would kill a process that writes to a map."""
        mapped = self._arrays[name]
        with open(self.folder / f"{name}.npy", "r+b") as f:
            for i, row in zip(indices, rows):
                f.seek(int(mapped.offset + i * mapped.strides[0]))
                f.write(np.ascontiguousarray(row, mapped.dtype).tobytes())
            f.flush()
            os.fsync(f.fileno())


@partial(jax.jit, static_argnums=(3, 4, 6))
def _top(
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    config: ModelConfig,
    k: int,
    temperature: Array,
    dtype: Any,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T E"]]:
    x_BTD, _ = hidden_states(params, tokens_BT, config, segments_BT=segments_BT, dtype=dtype)

    def row(x_TD: Array) -> tuple[Array, Array]:
        logits_TV = head(params, x_TD, config).astype(jnp.float32) / temperature
        _, ids_TK = jax.lax.top_k(logits_TV, k)
        return ids_TK, coarse(logits_TV, ids_TK)

    return jax.lax.map(row, x_BTD)  # the logits of one row at a time


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)

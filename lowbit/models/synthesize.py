"""Training text that a model writes itself, from nothing but its vocabulary (LLM-QAT, arXiv 2305.17888).

Every row starts with another token of the vocabulary. The next few tokens, a number drawn for each row, are the most
probable ones; the rest is sampled. A row ends behind an EOS that was drawn, or at its full length.

What row r holds depends on the model, the settings and r. Its draws have keys of their own, so the rows beside it
change it no more than a matrix product of another batch rounds otherwise.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lowbit.data.rows import permute
from lowbit.errors import InputError, unknown
from lowbit.files import atomic_path
from lowbit.models.cache import init_cache
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import head, hidden_states
from lowbit.models.generate import likeliest
from lowbit.models.model import Model
from lowbit.tree import Tree

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is written. The published code takes `top_k` 50 (its library's default) and counts the first token among
    the 3 to 5 certain ones, which is `greedy=(2, 4)` here; the paper reads as `(3, 5)`."""

    rows: int | None = None
    """Rows, each with another first token, drawn without replacement (default: the whole vocabulary, in its order)."""
    length: int = 256
    """Tokens of a row, at most."""
    greedy: tuple[int, int] = (3, 5)
    """How many tokens behind the first are the most probable ones: least and most; each row draws its own number."""
    temperature: float = 1.0
    top_k: int = 50
    """The other tokens are sampled from the k most probable; 0: from all."""
    seed: int = 0
    batch_size: int = 32
    """Rows written at once, and kept at once when the work is interrupted."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of compute and cache."""

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        low, high = self.greedy
        for name, value, ok, allowed in (
            ("rows", self.rows, self.rows is None or self.rows >= 1, "at least 1"),
            ("length", self.length, self.length >= 2, "at least 2"),
            ("greedy", self.greedy, 0 <= low <= high < self.length, "two counts, ascending, below the length"),
            ("temperature", self.temperature, 0 < self.temperature < float("inf"), "above 0; top_k 1 is greedy"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 2**32, "0 to 2^32 - 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
        ):
            if not ok:
                raise InputError(f"{name} is {value} (allowed: {allowed})")
        if self.dtype not in ("float32", "bfloat16"):
            raise unknown("dtype", self.dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` did. Times and rates are of this call; compilation is not in `seconds`."""

    rows: int
    tokens: int
    ended: int  # rows that end with EOS
    resumed: int  # rows that an earlier call had kept
    seconds: float
    compile_seconds: float
    tokens_per_second: float | None


def check(model: Model, settings: Settings) -> int:
    """How many rows there will be. Raises `InputError` for a model without tokenizer, and for more tokens than its
    context or more rows than its vocabulary has."""
    if model.tokenizer is None:
        raise InputError(f"model {model.source} has no tokenizer (allowed: a model with one)")
    if settings.length > model.config.max_position:
        raise InputError(
            f"length is {settings.length} (allowed: at most the model's context, {model.config.max_position})"
        )
    size = vocabulary(model)
    if settings.rows is not None and settings.rows > size:
        raise InputError(f"rows is {settings.rows} (allowed: at most one for each of the {size} tokens)")
    return size if settings.rows is None else settings.rows


def vocabulary(model: Model) -> int:
    """Tokens that model and tokenizer both know: a model's vocabulary may be padded."""
    return min(model.config.vocab_size, model.tokenizer.vocab_size)


def starts(model: Model, settings: Settings) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """`(first token, number of greedy tokens)` of every row, int32."""
    count, size = check(model, settings), vocabulary(model)
    first = np.arange(count) if settings.rows is None else permute(np.arange(count), size, settings.seed, 0)
    low, high = settings.greedy
    draws = permute(first, size, settings.seed, 1)  # of the token, so that a sample of the vocabulary is a part of it
    return first.astype(np.int32), (low + draws % (high - low + 1)).astype(np.int32)


def compiled(model: Model, settings: Settings) -> Callable[[Any, Any], list[list[int]]]:
    """The one program of all batches, compiled: first tokens and greedy counts, at most `batch_size`, to rows."""
    tokenizer, B = model.tokenizer, settings.batch_size
    eos = tuple(sorted(set(model.config.eos_token_ids) | set(getattr(tokenizer, "eos_ids", ()))))
    static = (settings.length, settings.top_k, vocabulary(model), eos, jnp.dtype(settings.dtype))

    def padded(a: Any) -> Array:
        return jnp.asarray(np.resize(np.asarray(a, np.int32), B))

    def arguments(first: Any, greedy: Any) -> tuple[Any, ...]:
        live = jnp.asarray(np.arange(B) < len(first))
        seed, heat = jnp.uint32(settings.seed), jnp.float32(settings.temperature)
        return model.params, padded(first), padded(greedy), live, seed, heat

    program = _rows.lower(*arguments([0], [0]), model.config, *static).compile()

    def run(first: Any, greedy: Any) -> list[list[int]]:
        tokens, counts = jax.device_get(program(*arguments(first, greedy)))
        return [row[:n].tolist() for row, n in zip(tokens[: len(first)], counts)]

    return run


@partial(jax.jit, static_argnums=(6, 7, 8, 9, 10, 11))
def _rows(
    params: Tree,
    first_B: Int[Array, " B"],
    greedy_B: Int[Array, " B"],
    live_B: Bool[Array, " B"],
    seed: Array,
    temperature: Array,
    config: ModelConfig,
    length: int,
    top_k: int,
    size: int,
    eos: tuple[int, ...],
    dtype: Any,
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Rows and how many tokens each has; rows that are not live from the start have one."""
    B = len(first_B)
    # A key of the first token, which no other row has: rows do not know where in which batch they are.
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first_B)
    known_V = jnp.arange(config.vocab_size) < size

    def going(state: Any) -> Array:
        return (state[0] < length) & jnp.any(state[4])

    def step(state: Any) -> Any:
        i, tokens_BL, counts_B, cache, live_B = state
        last_B1 = jax.lax.dynamic_slice_in_dim(tokens_BL, i - 1, 1, axis=1)
        x_B1D, cache = hidden_states(params, last_B1, config, cache=cache, scan=False, dtype=dtype)
        logits_BV = jnp.where(known_V, head(params, x_B1D[:, 0], config), -jnp.inf)
        best_BK, ids_BK = likeliest(logits_BV, temperature, 1.0, top_k or None)
        drawn_B = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, i), logits))(
            keys_B, best_BK
        )
        drawn_B = jnp.where(i <= greedy_B, 0, drawn_B)  # top_k sorts: 0 is the most probable
        next_B = jnp.take_along_axis(ids_BK, drawn_B[:, None], axis=1)[:, 0].astype(jnp.int32)
        tokens_BL = jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], i, axis=1)
        return i + 1, tokens_BL, counts_B + live_B, cache, live_B & ~jnp.isin(next_B, jnp.asarray(eos, jnp.int32))

    tokens_BL = jnp.zeros((B, length), jnp.int32).at[:, 0].set(first_B)
    cache = init_cache(params, config, B, length, dtype)
    start = (jnp.int32(1), tokens_BL, jnp.ones(B, jnp.int32), cache, live_B)
    _, tokens_BL, counts_B, _, _ = jax.lax.while_loop(going, step, start)
    return tokens_BL, counts_B


# -- the file ---------------------------------------------------------------------------------------------------------


def write(
    model: Model, settings: Settings, out: str | Path, on_batch: Callable[[int, int, float], None] | None = None
) -> Written:
    """Writes the rows to a .jsonl file: `text`, the ids `tokens` that it was decoded from, and the `tokenizer`'s hash,
    by which `lowbit.data.corpus` gives training exactly these ids.

    Whole batches are kept in `.NAME.partial` beside `out`, so that the same call goes on after an interruption and
    ends with the same bytes. `on_batch(rows done, rows, tokens a second)` is called after each. Raises `InputError`;
    among others when the partial file is of another model or of other settings.
    """
    out = Path(out)
    total = check(model, settings)
    state = out.with_name(f".{out.name}.partial")
    identity = {"version": VERSION, "model": model.fingerprint(), "tokenizer": model.tokenizer.hash}
    identity |= dataclasses.asdict(settings) | {"greedy": list(settings.greedy), "rows": total}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(state, "a+b") as f:
            resumed = _open(f, state, identity, settings.batch_size, total)
            written = _append(f, model, settings, resumed, total, on_batch)
            f.seek(0)
            f.readline()
            with atomic_path(out) as tmp, open(tmp, "wb") as whole:
                tokens, ended = 0, 0
                eos = set(model.config.eos_token_ids) | set(getattr(model.tokenizer, "eos_ids", ()))
                for line in f:
                    whole.write(line)
                    row = json.loads(line)["tokens"]
                    tokens, ended = tokens + len(row), ended + (len(row) > 1 and row[-1] in eos)
        state.unlink()
    except OSError as e:
        raise InputError(f"cannot write {state}: {e.strerror or e}") from e
    return Written(total, tokens, ended, resumed, *written)


def _open(f: Any, state: Path, identity: dict[str, Any], batch_size: int, total: int) -> int:
    """Rows that a partial file holds, in whole batches; what follows them is cut off. A new file gets its first line.

    Raises `InputError` when it is of another identity.
    """
    f.seek(0)
    head = f.readline()
    if not head.endswith(b"\n"):
        f.truncate(0)
        f.write(json.dumps(identity).encode() + b"\n")
        f.flush()
        return 0
    try:
        found = json.loads(head)
    except ValueError:
        found = {}
    differing = [k for k in sorted(identity | found) if identity.get(k) != found.get(k)]
    if differing:
        shown = ", ".join(f"{k} was {found.get(k)!r} and is {identity.get(k)!r}" for k in differing)
        raise InputError(f"{state} was begun otherwise: {shown} (allowed: the same, or remove it)")
    ends = [f.tell()]
    while f.readline().endswith(b"\n"):
        ends.append(f.tell())
    rows = len(ends) - 1
    rows = rows if rows == total else rows // batch_size * batch_size
    f.truncate(ends[rows])
    return rows


def _append(
    f: Any,
    model: Model,
    settings: Settings,
    start: int,
    total: int,
    on_batch: Callable[[int, int, float], None] | None,
) -> tuple[float, float, float | None]:
    """Writes the rows from `start` on; seconds of writing and of compiling, and tokens a second."""
    if start == total:
        return 0.0, 0.0, None
    began = time.monotonic()
    program = compiled(model, settings)
    first, greedy = starts(model, settings)
    compiled_at, tokens = time.monotonic(), 0
    for a in range(start, total, settings.batch_size):
        rows = program(first[a : a + settings.batch_size], greedy[a : a + settings.batch_size])
        for row in rows:
            line = {"text": model.tokenizer.decode(row), "tokens": row, "tokenizer": model.tokenizer.hash}
            f.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())
        tokens += sum(len(row) - 1 for row in rows)
        if on_batch is not None:
            on_batch(a + len(rows), total, tokens / (time.monotonic() - compiled_at))
    seconds = time.monotonic() - compiled_at
    return seconds, compiled_at - began, tokens / seconds

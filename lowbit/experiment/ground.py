"""What the rows of an experiment share: a model in float32, rows of text to train on, other text to evaluate on; and
`fit`, which trains and goes on where an earlier start ended, and `kept`, which measures once."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import tree as trees
from lowbit import xla
from lowbit.data import rows
from lowbit.errors import InputError, Stopped
from lowbit.experiment.progress import Progress
from lowbit.experiment.run import Run, write_json
from lowbit.experiment.texts import Data, first_tokens, read_documents, split
from lowbit.export.open import open_model
from lowbit.models.model import Model
from lowbit.qat.base import Recipe
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.tree import Tree


@dataclasses.dataclass(frozen=True)
class Ground:
    fp: Model
    """In float32: the start of every row, the teacher, and what results are compared to."""
    documents: list[str]
    """Those that are trained or calibrated on."""
    packed: rows.Rows
    """The same as rows of tokens."""
    text: list[str]
    """What is evaluated on, disjoint from `documents`."""
    held_out: int
    """Documents held out; `text` is the first of them."""
    overlap: int | None
    """Documents left out because the model was pretrained on a part of them (None: not known)."""


def ground(model: Model, name: str, data: Data, seq: int, run: Run, documents: list[str] | None = None) -> Ground:
    """Of a model, called `name`; rows of at most `seq` tokens lie in the run's directory. `documents` default to those
    of `data`. Raises `InputError`."""
    if model.tokenizer is None:
        raise InputError(f"model {name} has no tokenizer (allowed: a model with one)")
    found, held_out, overlap = split(data, model, read_documents(data) if documents is None else documents)
    packed = rows.prepare(found, model.tokenizer, min(seq, model.config.max_position), run.path("rows"))
    return Ground(
        as_float32(model), found, packed, first_tokens(model, held_out, data.eval_tokens), len(held_out), overlap
    )


def open_ground(name: str, data: Data, seq: int, run: Run) -> Ground:
    """`ground` of a model by its name."""
    return ground(open_model(name), name, data, seq, run)


def as_float32(model: Model) -> Model:
    return model.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params))


def fit(
    run: Run, name: str, params: Tree, settings: TrainConfig, fp: Model, packed: rows.Rows, recipe: Recipe | None = None
) -> Tree:
    """`params` after training on `packed`, with `fp` as teacher where the objective has one. Its files lie in the part
    `name` of the run; a resumed run goes on from its checkpoint. Raises `Stopped`."""
    part = run.sub(slug(name))
    with Progress(name, settings.steps, settings.log_every) as progress:

        def on_metrics(m: dict[str, Any]) -> None:
            part.log(**m)
            progress.update(m["step"], loss=m["loss"], tokens_per_second=round(m["tokens_per_second"]))

        def on_resume(step: int) -> None:
            part.rewind(step)
            progress.resume(step)

        result = train(
            params,
            lambda step: packed.batch(step, settings.batch_size, settings.seed),
            language(fp.config, settings, fp.config),
            settings,
            teacher=fp.params if settings.taught else None,
            wrap=None if recipe is None else recipe.wrap,
            revise=None if recipe is None or recipe.revise is None else partial(recipe.revise, fp.config),
            directory=part.path("checkpoints"),
            resume=run.resumed,
            fingerprint={"rows": dataclasses.asdict(packed.manifest)},
            on_metrics=on_metrics,
            on_resume=on_resume,
        )
    if result.status == "stopped":
        raise Stopped(result.message)
    return result.params


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, as JSON; what an earlier start wrote to `path` is taken from there."""
    if not path.exists():
        write_json(path, measure())
        xla.release()
    return json.loads(path.read_text())


def rest_bf16(params: Tree) -> Tree:
    """What is not quantized, in bf16 as it is stored; packed weights and their adapters as they are."""
    return trees.map_leaves(lambda _, x: x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x, params)


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9_+.]+", "-", name.lower())

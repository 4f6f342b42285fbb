"""The text of an experiment: documents for training or calibration, and others, unseen by the model, to evaluate on."""

import dataclasses
import itertools
from pathlib import Path

from lowbit.data import contamination, corpus
from lowbit.errors import InputError
from lowbit.models.model import Model

HASHES = "training_hashes.npz"  # beside a model whose training text is known


@dataclasses.dataclass(frozen=True)
class Data:
    """Default: prose and source code that every Python installation carries, without what the model was trained on."""

    path: Path | None = None
    """A text, .jsonl file or folder instead."""
    hub: str | None = None
    """A hub data set by name instead."""
    hub_split: str = "train"
    hub_config: str | None = None
    field: str = "text"
    """Field of a data set or .jsonl line that holds the text."""
    documents: int = 2000
    """Documents read from a hub data set, at most."""
    held_out: float = 0.25
    """Part of the documents that is evaluated on and never trained on."""
    eval_tokens: int = 16384
    """Tokens evaluated on, at most."""
    convention: str | None = None
    """Of the evaluation (see docs/evaluate.md); default: gptq-N with the model's context."""


def read_documents(data: Data) -> list[str]:
    """The text as documents; one long document is cut into pieces, so that a part can be held out."""
    if data.path is not None and data.hub is not None:
        raise InputError(f"--data.path {data.path} and --data.hub {data.hub} (allowed: one of them)")
    if data.path is not None:
        documents = list(corpus.documents(data.path, data.field))
    elif data.hub is not None:
        found = corpus.hub_documents(data.hub, data.hub_split, data.hub_config, data.field)
        documents = list(itertools.islice(found, data.documents))
    else:
        documents = corpus.python_corpus()
    return documents if len(documents) >= 20 else [p for d in documents for p in corpus.pieces(d, 4000)]


def split(data: Data, base: Model, documents: list[str]) -> tuple[list[str], list[str], int | None]:
    """Training and evaluation documents without a sampled 13-gram in common, none of which the model was pretrained on,
    and how many documents that removed (None: nobody knows what the model was trained on)."""
    removed = None
    if (known := Path(base.source) / HASHES).is_file():
        hashes = contamination.Contamination.load(known)
        seen = set(hashes.overlap(documents))
        removed = len(seen)
        documents = [d for i, d in enumerate(documents) if i not in seen]
    parts = contamination.split(documents, data.held_out, salt="quickstart")
    if removed is not None:
        hashes.assert_disjoint(parts.held_out)
    contamination.Contamination.of(parts.train).assert_disjoint(parts.held_out)
    return parts.train, sorted(parts.held_out, key=contamination.document_hash), removed


def first_tokens(model: Model, documents: list[str], count: int) -> list[str]:
    """The first documents, the last one cut, that hold about `count` tokens."""
    out, total = [], 0
    for document in documents:
        ids = model.tokenizer.encode(document, bos=False)
        if total + len(ids) > count:
            part = document[: int(len(document) * (count - total) / len(ids))]
            return [*out, part] if part.strip() else out
        out, total = [*out, document], total + len(ids)
    return out

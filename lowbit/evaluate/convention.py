"""Named perplexity conventions: which windows of a text a model sees, and which of their tokens are scored.

| name | windows | scored |
|---|---|---|
| `gptq-N` | the text tokenised once (BOS at its very start only, if the tokenizer adds one), disjoint windows of N | all but the first token: N - 1 |
| `llamacpp-N` | the same, and the first token of each window replaced by BOS if the tokenizer adds one | those that logits N/2 to N-2 predict: N - 1 - N/2 |
| `stories-256` | the first 60 stories (split at `<|endoftext|>`, stripped) of over 200 characters, BOS before each, cut after 256 tokens of text | all of those |

A rest that fills no window is not scored. `gptq-N` is what GPTQ, AWQ and most papers report, `llamacpp-N` what
llama-perplexity prints; the two do not compare.
"""  # noqa: E501

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lowbit.data.corpus import SEPARATOR
from lowbit.data.tokenizer import Tokenizer
from lowbit.errors import InputError

STORIES, STORY_TOKENS, STORY_CHARACTERS = 60, 256, 200
DEFAULT_LIMIT = 4096  # papers go no higher, and attention in one window costs its square
_NAME = re.compile(r"(gptq|llamacpp)-([1-9][0-9]*)")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids `[n, T]` int32 (padded with 0 at the right) and which of them are scored, bool `[n, T]`.

    Token t is scored with the logits at t - 1, so the model reads `tokens[:, :-1]`.
    """

    tokens: np.ndarray
    scored: np.ndarray
    convention: str


def default_convention(max_position: int) -> str:
    """`gptq-N` with the largest N that the model's context allows, at most 4096."""
    return f"gptq-{min(max_position, DEFAULT_LIMIT)}"


def parse(name: str, max_position: int) -> tuple[str, int]:
    """`(kind, N)` of a convention's name. Raises `InputError` for an unknown one or an N beyond the model's context."""
    if name == f"stories-{STORY_TOKENS}":
        kind, n = "stories", STORY_TOKENS
    elif match := _NAME.fullmatch(name):
        kind, n = match[1], int(match[2])
        if n < (2 if kind == "gptq" else 4):
            raise InputError(f"convention {name!r}: N = {n} scores no token (allowed: at least 4)")
    else:
        raise InputError(f"unknown convention {name!r} (allowed: stories-256, gptq-N, llamacpp-N)")
    if n > max_position:
        raise InputError(f"convention {name!r}: N = {n} (allowed: at most the model's context, {max_position})")
    return kind, n


def windows(
    text: str | Sequence[str], tokenizer: Tokenizer, convention: str | None = None, max_position: int = DEFAULT_LIMIT
) -> Windows:
    """The windows of a text, or of documents (joined by a blank line where the convention wants one text).

    Raises `InputError` for a text that is empty or fills no window, saying how much was found and needed.
    """
    name = default_convention(max_position) if convention is None else convention
    kind, n = parse(name, max_position)
    whole = text if isinstance(text, str) else "\n\n".join(text)
    if not whole.strip():
        raise InputError("text is empty (allowed: at least one window of it)")
    if kind == "stories":
        return _stories(text, tokenizer, name)
    ids = tokenizer.encode(whole)
    count = len(ids) // n
    if count < 1:
        raise InputError(f"text has {len(ids)} tokens (needed: at least {n}, one window of {name})")
    tokens = np.array(ids[: count * n], np.int32).reshape(count, n)
    scored = np.zeros((count, n), bool)
    if kind == "gptq":
        scored[:, 1:] = True
    else:
        if tokenizer.adds_bos:
            tokens[:, 0] = tokenizer.bos_id
        scored[:, n // 2 + 1 :] = True
    return Windows(tokens, scored, name)


def _stories(text: str | Sequence[str], tokenizer: Tokenizer, name: str) -> Windows:
    parts = [p.strip() for d in ([text] if isinstance(text, str) else text) for p in d.split(SEPARATOR)]
    stories = [p for p in parts if len(p) > STORY_CHARACTERS][:STORIES]
    if not stories:
        raise InputError(
            f"text has {len(parts)} stories, none over {STORY_CHARACTERS} characters (needed for {name}: at least 1)"
        )
    if tokenizer.bos_id is None:
        raise InputError(f"convention {name!r} with a tokenizer that has no BOS (allowed: gptq-N, llamacpp-N)")
    rows = [ids[: STORY_TOKENS + 1] for ids in tokenizer.encode_many(stories, bos=True)]
    tokens = np.zeros((len(rows), STORY_TOKENS + 1), np.int32)
    scored = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        scored[i, 1 : len(ids)] = True
    return Windows(tokens, scored, name)

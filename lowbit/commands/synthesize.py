"""`lowbit synthesize`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lowbit.commands.common import Flag, Model, Result, check_output, lines, load, result


@dataclasses.dataclass(frozen=True)
class Synthesize:
    """Text that a model writes, for training without data (LLM-QAT): one row for each first token.

    The same command goes on after an interruption, to the same bytes. `lowbit train --text FILE` sees the very tokens.
    """

    model: Model
    """Folder, file, run directory or hub id."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The .jsonl file to write: `text`, `tokens` and `tokenizer` of each row."""
    rows: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Rows, whose first tokens are drawn from the vocabulary (default: one for each token)."""
    length: int = 256
    """Tokens of a row, at most; a row ends sooner where the text ends."""
    greedy: tuple[int, int] = (3, 5)
    """Least and greatest number of most probable tokens behind the first; each row draws its own."""
    temperature: float = 1.0
    top_k: int = 50
    """Sample the other tokens from the k most probable; 0: from all."""
    seed: int = 0
    batch_size: int = 32
    """Rows written, and kept, at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of compute and cache."""
    force: Flag = False
    """Replace FILE."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.errors import InputError
        from lowbit.experiment.progress import Progress
        from lowbit.models import synthesize

        names = [f.name for f in dataclasses.fields(synthesize.Settings)]
        settings = synthesize.Settings(**{name: getattr(self, name) for name in names})
        if self.out.suffix != ".jsonl":
            raise InputError(f"--out {self.out} (allowed: a name that ends in .jsonl)")
        check_output(self.out, self.force)
        model = load(self.model)
        total = synthesize.check(model, settings)
        with Progress("synthesize", total, pause=2.0) as progress:

            def on_batch(done: int, total: int, rate: float) -> None:
                progress.update(done, **{"tokens/s": round(rate)})

            done = synthesize.write(model, settings, self.out, on_batch)
        data: dict[str, Any] = {"model": self.model, "out": str(self.out), **dataclasses.asdict(done)}
        data |= {k: round(data[k], 3) for k in ("seconds", "compile_seconds")}
        data |= {"length": self.length, "seed": self.seed, "bytes": self.out.stat().st_size}
        return result(data, lines(data))

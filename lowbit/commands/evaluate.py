"""`lowbit eval` and `lowbit compare`."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.commands.common import Flag, Model, Result, Word, WordPath, lines, load, result, with_runtime
from lowbit.errors import InputError


@dataclasses.dataclass(frozen=True)
class Eval:
    """Perplexity of a model on a text, its divergence from a reference, and its size."""

    model: Model
    """Folder, file, run directory or hub id."""
    text: WordPath = None
    """UTF-8 text, .jsonl, or a folder of them."""
    against: Word = None
    """A reference MODEL, or a file that llama-perplexity --kl-divergence-base wrote, which holds its own text (then
    without --text): adds KL divergence and same-top-1."""
    convention: Word = None
    """stories-256, gptq-N or llamacpp-N (default: gptq-N with the model's whole context, 4096 at most)."""
    self_noise: Flag = False
    """Also what the reference gets against itself in bfloat16: the floor of the divergence."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    kv: Word = None
    """Format of the key-value cache (see lowbit formats); the model's own by default."""
    k_cache: Word = None
    """Format of the keys alone."""
    v_cache: Word = None
    """Format of the values alone."""
    kv_rotate: Flag = False
    """Hadamard transform of keys, queries and values over the head dimension before they are quantized."""
    act: Word = None
    """Activation format of every linear inside blocks."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.evaluate.perplexity import evaluate

        if self.self_noise and self.against is None:
            raise InputError("--self-noise without --against (allowed: together with it)")
        if is_kld(self.against):
            return self.against_file()
        if self.text is None:
            raise InputError("no --text (allowed: a text, or a KL base file as --against)")
        text = read_text(self.text, self.field)
        model = with_runtime(load(self.model), self)
        reference = None if self.against is None else load(self.against)
        start = time.monotonic()
        with Batches("eval") as batches:
            out = evaluate(model, text, reference, self.convention, self_noise=self.self_noise, on_batch=batches.update)
        return self.result(out, start)

    def against_file(self) -> Result:
        """Against a KL base file: its text, its windows."""
        from lowbit.evaluate.kld_file import evaluate_against_kld

        for name, value in (
            ("text", self.text),
            ("convention", self.convention),
            ("self-noise", self.self_noise or None),
        ):
            if value is not None:
                raise InputError(
                    f"--{name} with the KL base file {self.against}, which says what is measured (allowed: without)"
                )
        model = with_runtime(load(self.model), self)
        start = time.monotonic()
        with Batches("eval") as batches:
            out = evaluate_against_kld(model, str(self.against), on_batch=batches.update)
        return self.result(out, start)

    def result(self, out: dict[str, Any], start: float) -> Result:
        text = None if self.text is None else str(self.text)
        runtime = {k: v for k in ("kv", "k_cache", "v_cache", "kv_rotate", "act") if (v := getattr(self, k))}
        data = {"model": self.model, "text": text, "against": self.against, **runtime, **out}
        data["seconds"] = round(time.monotonic() - start, 3)
        shown = {k: v for k, v in data.items() if not isinstance(v, dict)}
        return result(data, lines(shown | {f"self_noise {k}": v for k, v in data.get("self_noise", {}).items()}))


class Batches:
    """Progress over batches whose number is known with the first; use as a context manager."""

    def __init__(self, label: str):
        self.label = label
        self.bar: Any = None

    def update(self, done: int, total: int) -> None:
        from lowbit.experiment.progress import Progress

        if self.bar is not None and self.bar.total != total:
            self.close()
        if self.bar is None:
            self.bar = Progress(self.label, total, pause=2.0)
        self.bar.update(done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def is_kld(source: str | None) -> bool:
    """Whether `--against` is a KL base file: by its first bytes, or by its suffix (a damaged one is refused later)."""
    from lowbit.evaluate.kld_file import MAGIC

    if source is None or not Path(source).is_file():
        return False
    with open(source, "rb") as f:
        return f.read(len(MAGIC)) == MAGIC or Path(source).suffix == ".kld"


@dataclasses.dataclass(frozen=True)
class Compare:
    """Evaluate several models on one text; the first is the reference of the others.

    Every model is measured in the same windows: those of the shortest context.
    """

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL ...")]]
    """Two or more folders, files, run directories or hub ids."""
    text: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """UTF-8 text, .jsonl, or a folder of them."""
    convention: Word = None
    """stories-256, gptq-N or llamacpp-N (default: gptq-N with the shortest context, 4096 at most)."""
    out: WordPath = None
    """Folder for a report: table, plot and page."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.evaluate.convention import default_convention
        from lowbit.evaluate.perplexity import evaluate
        from lowbit.experiment import report
        from lowbit.experiment.progress import Progress

        if len(self.models) < 2:
            raise InputError(f"compare {' '.join(self.models)}: {len(self.models)} model (needed: at least 2)")
        text = read_text(self.text, self.field)
        reference = load(self.models[0])
        others = [load(m) for m in self.models[1:]]
        shortest = min(m.config.max_position for m in (reference, *others))
        convention = self.convention or default_convention(shortest)
        rows: list[dict[str, Any]] = []
        with Progress("compare", len(self.models), every=1) as progress:
            for i, (name, model) in enumerate(zip(self.models, [reference, *others])):
                start = time.monotonic()
                out = evaluate(model, text, reference if i else None, convention)
                rows.append({"name": name, **out, "seconds": round(time.monotonic() - start, 3)})
                progress.update(i + 1, perplexity=out["perplexity"])
        shown = [{k: v for k, v in row.items() if k in report.COLUMNS} for row in rows]
        text_out = report.text_table(shown) + f"\n\nconvention {convention}, reference {self.models[0]}"
        data: dict[str, Any] = {"convention": convention, "reference": self.models[0], "rows": rows}
        if self.out is not None:
            notes = f"Text {self.text}, convention {convention}, reference {self.models[0]}."
            report.write_report(shown, self.out, "Comparison", notes)
            data["report"], text_out = str(self.out), f"{text_out}\nreport {self.out}"
        return result(data, text_out)


def read_text(path: Path, field: str = "text") -> str | list[str]:
    """A text file as it is, or the documents of a .jsonl file or a folder. Raises `InputError`."""
    from lowbit.data.corpus import documents, read_utf8

    if path.is_file() and path.suffix != ".jsonl":
        text = read_utf8(path)
        if not text.strip():
            raise InputError(f"text {path} is empty (allowed: at least one non-empty document)")
        return text
    return list(documents(path, field))

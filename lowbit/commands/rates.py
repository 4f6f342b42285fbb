"""`lowbit plan`."""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro

from lowbit.commands.common import Flag, Model, Result, check_output, lines, load, result
from lowbit.errors import InputError

Number = Annotated[float | None, tyro.conf.arg(metavar="B", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class PlanRates:
    """Choose a format for every linear inside blocks under a budget, by what its error costs the model, and write the
    rules file that --rules of quantize, train and estimate reads."""

    model: Model
    """Folder, file, run directory or hub id of a float model."""
    text: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Text on which the cost is measured: UTF-8, .jsonl, or a folder of them."""
    formats: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
    """What to choose from, such as e8p2 e8p3 e8p4 int4:g64 (see lowbit formats)."""
    out: Annotated[Path, tyro.conf.arg(metavar="RULES.toml")]
    """Rules file to write."""
    bits: Number = None
    """Budget: bits per weight of the linears inside blocks, scales included."""
    bytes: Count = None
    """Budget: stored bytes of the whole model."""
    rows: int = 16
    """Rows of tokens that the cost of noise in each tensor is measured on."""
    length: int = 0
    """Tokens of a row (0: the model's context, 2048 at most)."""
    seed: int = 0
    """Of the rows and of the noise."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    force: Flag = False
    """Replace the file --out."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.commands.evaluate import Batches, read_text
        from lowbit.ptq.rates import choose

        for name, value, least in (("rows", self.rows, 1), ("length", self.length, 0)):
            if value < least:
                raise InputError(f"--{name} is {value} (allowed: at least {least})")
        if (self.bits is None) == (self.bytes is None):
            given = "neither --bits nor --bytes" if self.bits is None else "both --bits and --bytes"
            raise InputError(f"plan with {given} (allowed: one of them)")
        check_output(self.out, self.force)
        text = read_text(self.text, self.field)
        model = load(self.model)
        start = time.monotonic()
        with Batches("plan") as batches:
            rates = choose(
                model,
                self.formats,
                [text] if isinstance(text, str) else text,
                bits=self.bits,
                nbytes=self.bytes,
                rows=self.rows,
                length=self.length,
                seed=self.seed,
                progress=batches.update,
            )
        budget = f"{self.bits:g} bits per weight" if self.bits is not None else f"{self.bytes} bytes"
        rates.save(
            self.out, f"lowbit plan {self.model}: {budget}\n{rates.bytes} bytes, {rates.bits:.4f} bits per weight"
        )
        used = Counter(rates.formats.values())
        data = {
            "model": self.model,
            "out": str(self.out),
            "budget_bits": self.bits,
            "budget_bytes": self.bytes,
            "bytes_quantized": rates.bytes,
            "bits_per_weight_quantized": rates.bits,
            "predicted_kl": rates.kl,
            "bound_kl": rates.bound,
            "exact": rates.exact,
            "formats": dict(used),
            "tensors": [
                {"path": p, "format": f, "sensitivity": rates.sensitivity[p], "error": rates.error[p]}
                for p, f in rates.formats.items()
            ],
            "seconds": round(time.monotonic() - start, 3),
        }
        width = max(map(len, rates.formats))
        table = [f"{'tensor'.ljust(width)}  {'format':12}  KL per error    error"]
        table += [
            f"{p.ljust(width)}  {f:12}  {rates.sensitivity[p]:12.4g}  {rates.error[p]:7.4f}"
            for p, f in rates.formats.items()
        ]
        shown = {k: v for k, v in data.items() if k not in ("tensors", "formats")}
        shown["formats"] = ", ".join(f"{n} {f}" for f, n in used.items())
        return result(data, "\n".join(table) + "\n\n" + lines(shown))

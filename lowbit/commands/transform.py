"""`lowbit transform`."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.commands.common import Flag, Model, Result, Word, WordPath, check_output, lines, load, result
from lowbit.errors import InputError


@dataclasses.dataclass(frozen=True)
class Transform:
    """Change a model into one that computes the same and is easier to quantize: rotations and smoothing.

    What folds into the weights leaves as a plain Hugging Face folder, which every runtime reads; a model that keeps
    transforms in its forward pass leaves as a packed folder, which lowbit reads. After an interruption the same command
    goes on with what was learned.
    """

    model: Model
    """Folder, file, run directory or hub id."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """quarot, spinquant, smoothquant, flatquant, with parts and keys (quarot:r1+r4, spinquant:r1+r2:steps100), or a
    .safetensors file that --save wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write."""
    calib: WordPath = None
    """Calibration text, for smoothquant, spinquant and flatquant."""
    format: Word = None
    """Format of the weights that a learned transform is learned for."""
    rules: WordPath = None
    """The same as a TOML file; inputs (path:in) and caches too."""
    save: WordPath = None
    """Also write the transform itself, as a .safetensors file."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    force: Flag = False
    """Replace what is in --out and --save."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.commands.evaluate import read_text
        from lowbit.commands.inspect import make_plan
        from lowbit.formats.fake_quant import PreparedInput
        from lowbit.models.cache import CacheSite
        from lowbit.models.hf import save_hf
        from lowbit.rotations import base, state_file
        from lowbit.rotations.fold import apply
        from lowbit.tree import items

        found = base.get(self.name)
        check_output(self.out, self.force)
        if self.save is not None:
            if self.save.suffix != ".safetensors":
                raise InputError(f"--save {self.save} (allowed: a path that ends in .safetensors)")
            check_output(self.save, self.force)
        if found.calibrates and self.calib is None:
            raise InputError(f"transform {self.name} without --calib (allowed: with a calibration text)")
        if not found.learns and (self.format or self.rules) is not None:
            raise InputError(f"--format or --rules with {self.name}, which does not learn (allowed: without)")
        plan = None if (self.format or self.rules) is None else make_plan(self.format, self.rules)
        text = None if self.calib is None else read_text(self.calib, self.field)
        documents = [text] if isinstance(text, str) else text
        model = load(self.model)
        assignment = None if plan is None else plan.resolve(model.config.shapes())
        start = time.monotonic()
        partial = self.out.with_name(f".{self.out.name}.partial.safetensors")
        state = fitted(self.name, model, documents, assignment, partial)
        done = apply(model, state)
        online = sum(isinstance(leaf, PreparedInput) for _, leaf in items(done.params))
        caches = sum(isinstance(leaf, CacheSite) for _, leaf in items(done.params))
        packed = online + caches > 0
        save_hf(done, self.out, dtype=None, packed=packed)
        if self.save is not None:
            state_file.save(state, self.save)
        partial.unlink(missing_ok=True)
        data: dict[str, Any] = {
            "model": self.model,
            "out": str(self.out),
            "transform": state.name,
            "online": online,
            "caches": caches,
            "folder": "packed" if packed else "plain",
            "save": None if self.save is None else str(self.save),
            "seconds": round(time.monotonic() - start, 3),
        }
        return result(data, lines(data))


def fitted(name: str, model: Any, documents: list[str] | None, assignment: Any, partial: Path) -> Any:
    """The transform's state for a model, with progress on stderr; a learned one is kept in `partial` as it goes.

    Raises `InputError` for a transform that needs calibration text where there is none.
    """
    from lowbit.experiment.progress import Progress
    from lowbit.rotations import base

    found = base.get(name)
    if found.calibrates and documents is None:
        raise InputError(f"transform {name} without --calib (allowed: with a calibration text)")
    if not found.learns:
        return found.fit(model, documents, assignment)
    bars: list[Progress] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        if not bars:
            bars.append(Progress(name, steps, pause=2.0))
        bars[0].update(step, loss=loss)

    try:
        return found.fit(model, documents, assignment, on_step=on_step, progress=partial)
    finally:
        for bar in bars:
            bar.close()

"""`lowbit quantize` and `lowbit export`."""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.commands.common import Flag, Model, Result, Word, WordPath, check_output, folder_of, lines, load, result
from lowbit.commands.inspect import make_plan
from lowbit.commands.transform import fitted
from lowbit.errors import InputError, unknown
from lowbit.ptq.options import (
    OPTIONS,
    AqlmOptions,
    GptqOptions,
    GuidedOptions,
    LdlqOptions,
    LnqOptions,
    VptqOptions,
    YaqaOptions,
)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a model without training, into a packed folder that every command reads."""

    model: Model
    """Folder, file, run directory or hub id."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write."""
    format: Word = None
    """Format of the linears inside blocks (see lowbit formats)."""
    rules: WordPath = None
    """TOML file of [[rule]] match, format; the first match wins."""
    solver: str = "rtn"
    """rtn: round to nearest; calibrated on --calib: gptq, ldlq: with error feedback, yaqa: on both sides, guided: by
    the loss's gradients; aqlm, vptq, lnq: learned codebooks."""
    transform: str = "none"
    """none: the network as it is; quarot, spinquant, smoothquant, flatquant or a saved one (see lowbit transform): the
    model is held in memory then, in float32."""
    calib: WordPath = None
    """Calibration text: UTF-8, .jsonl, or a folder of them, for solvers, transforms and static activation formats."""
    gptq: GptqOptions = GptqOptions()
    ldlq: LdlqOptions = LdlqOptions()
    yaqa: YaqaOptions = YaqaOptions()
    guided: GuidedOptions = GuidedOptions()
    aqlm: AqlmOptions = AqlmOptions()
    vptq: VptqOptions = VptqOptions()
    lnq: LnqOptions = LnqOptions()
    force: Flag = False
    """Replace what is in --out."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.commands.evaluate import read_text
        from lowbit.evaluate.size import file_bytes, folder_sizes
        from lowbit.experiment.progress import Progress
        from lowbit.models.hf import save_hf
        from lowbit.ptq import base as solvers
        from lowbit.rotations import base as transforms
        from lowbit.rotations.fold import apply

        solver = solvers.get(self.solver)
        transform = None if self.transform == "none" else transforms.get(self.transform)
        plan = make_plan(self.format, self.rules)
        check_output(self.out, self.force)
        text = None if self.calib is None else read_text(self.calib)
        documents = [text] if isinstance(text, str) else text
        if solver.calibrates and documents is None:
            raise InputError(f"solver {self.solver} without --calib (allowed: a calibration text)")
        given = {name: getattr(self, name) for name in OPTIONS}
        for name, own in given.items():
            if self.solver != name and own != type(own)():
                raise InputError(f"--{name} options with solver {self.solver} (allowed: with --solver {name})")
        options = dataclasses.asdict(given[self.solver]) if self.solver in given else {}
        if transform is not None and transform.calibrates and documents is None:
            raise InputError(f"transform {self.transform} without --calib (allowed: a calibration text)")
        uses = solver.calibrates or (transform is not None and transform.calibrates) or has_static(plan)
        if documents is not None and not uses:
            note = f"solver {self.solver} and transform {self.transform} use no data; --calib {self.calib} is not used"
            print(f"lowbit: note: {note}", file=sys.stderr)
        start = time.monotonic()
        folder = folder_of(self.model)
        bars: list[Progress] = []

        def on_block(done: int, total: int) -> None:
            if not bars:
                bars.append(Progress("quantize", total, pause=2.0))
            bars[0].update(done)

        try:
            if transform is None and folder is not None and solver.quantize_dir is not None:
                partial = self.out.with_name(f".{self.out.name}.partial")
                try:
                    solver.quantize_dir(folder, plan, self.out, on_block, documents, **options)
                except InputError as e:
                    if not isinstance(e.__cause__, OSError):  # a full disk can be resumed, bad input cannot
                        shutil.rmtree(partial, ignore_errors=True)
                    raise
            else:
                model = load(self.model)
                learned = self.out.with_name(f".{self.out.name}.partial.safetensors")
                if transform is not None:
                    wanted = plan.resolve(model.config.shapes())
                    model = apply(model, fitted(self.transform, model, documents, wanted, learned))
                assignment = plan.resolve(model.config.shapes())
                params = solver.quantize(model, assignment, documents, progress=on_block, **options)
                save_hf(model.replace(params=params), self.out, dtype=None, packed=True)
                learned.unlink(missing_ok=True)
        finally:
            for bar in bars:
                bar.close()
        data = {
            "model": self.model,
            "out": str(self.out),
            "format": self.format,
            "solver": self.solver,
            "transform": self.transform,
            "file_bytes": file_bytes(self.out),
            **folder_sizes(self.out),
            "seconds": round(time.monotonic() - start, 3),
        }
        return result(data, lines(data))


def has_static(plan: Any) -> bool:
    """Whether a plan has static activation formats, whose range comes from calibration text."""
    from lowbit.formats.activation import get_act
    from lowbit.plan import INPUT, KEEP

    return any(r.format != KEEP and get_act(r.format).static for r in plan.rules if r.match.endswith(INPUT))


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model for another runtime, reload what was written, and compare it with the model."""

    model: Model
    """Folder, file, run directory or hub id."""
    to: tyro.conf.UseAppendAction[tuple[str, ...]]
    """gguf, gguf:TYPE (F16, Q8_0, Q4_0, TQ2_0, ...), hf, hf:DTYPE, packed, or the layout of a vector format's runtime:
    aqlm, vptq, exl3, quip, qtip; repeat for several."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """File (gguf) or folder (the others); with several targets, a folder that gets one of each."""
    override: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="REGEX=TYPE", help_behavior_hint="")
    ] = ()
    """GGUF type of the tensors whose path the regex matches whole ('.*down_proj=F16'); repeat, the first match wins."""
    embedding: Annotated[str | None, tyro.conf.arg(metavar="TYPE", help_behavior_hint="")] = None
    """GGUF type of the embedding and the head."""
    drop_activations: Flag = False
    """Export a model with activation formats to a target that has none."""
    force: Flag = False
    """Replace what is at --out."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.experiment.progress import Progress
        from lowbit.export.api import export, targets
        from lowbit.export.gguf_types import get

        allowed = targets()
        for target in self.to:
            if canonical(target) not in {canonical(t) for t in allowed}:
                raise unknown("export target", target, allowed)
        if not self.to:
            raise InputError(f"export has 0 targets (allowed: --to with {', '.join(allowed)})")
        if len(set(map(canonical, self.to))) != len(self.to):
            raise InputError(f"export targets {', '.join(self.to)} (allowed: each once)")
        others = [t for t in self.to if not canonical(t).startswith("gguf")]
        if others and (self.override or self.embedding):
            raise InputError(f"--override or --embedding with target {others[0]} (allowed: with gguf targets alone)")
        overrides = [parse_override(text) for text in self.override]
        embedding = self.embedding and get(self.embedding).name
        options = {"overrides": overrides, "embedding": embedding, "drop_activations": self.drop_activations}
        paths = destinations(self.to, self.out, model_name(self.model))
        for path in paths:
            check_output(path, self.force)
        source = folder_of(self.model) or load(self.model)
        reports = []
        with Progress("export", len(paths), every=1) as progress:
            for target, path in zip(self.to, paths):
                reports.append(r := export(source, target, path, **options))
                kl = {} if r["kl_mean"] is None else {"KL": r["kl_mean"]}
                progress.update(len(reports), to=target, path=path, bytes=r["bytes"], **kl)
        data = {"model": self.model, "exports": reports}
        if len(reports) == 1:
            data |= reports[0]
        text = "\n\n".join(lines(readable(r)) for r in reports)
        return result(data, text)


def parse_override(text: str) -> tuple[str, str]:
    """The regex over paths and the GGUF type of a `REGEX=TYPE`; the last `=` divides them."""
    from lowbit.export.gguf_types import get

    regex, equals, kind = text.rpartition("=")
    if not equals or not regex:
        raise InputError(f"--override {text!r} (allowed: REGEX=TYPE, such as '.*down_proj=F16')")
    return regex, get(kind).name


def readable(report: dict[str, Any]) -> dict[str, Any]:
    """A report for a person: what is long is counted."""
    out = {k: v for k, v in report.items() if v not in ([], {})}
    if "rounded" in out:
        out["rounded"] = f"{sum(out['rounded'].values()):,} values of {len(out['rounded'])} tensors"
    if "fresh" in out:
        out["fresh"] = f"{len(out['fresh'])} float tensors, quantized here"
    if "types" in out:
        out["types"] = ", ".join(f"{n} {t}" for t, n in out["types"].items())
    if "notes" in out:
        out["notes"] = "; ".join(out["notes"])
    return out


def model_name(source: str) -> str:
    """A file name for a model: its folder's or file's name, without the suffix of a file."""
    path = Path(source)
    return (path.stem if path.is_file() else path.name) or "model"


def canonical(target: str) -> str:
    """Targets compare without regard to case."""
    return target.lower()


def destinations(targets: tuple[str, ...], out: Path, name: str) -> list[Path]:
    """Where each target goes: `out` itself for one, `out/NAME-TYPE.gguf` and `out/hf` for several or a folder."""
    several = len(targets) > 1
    paths = []
    for target in targets:
        kind, _, option = target.partition(":")
        if kind == "gguf":
            inside = several or out.is_dir()
            paths.append(out / (f"{name}-{option}.gguf" if option else f"{name}.gguf") if inside else out)
        else:
            paths.append(out / target.replace(":", "-") if several else out)
    return paths

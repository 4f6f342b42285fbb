"""`lowbit run FILE` and `lowbit report PATH...`."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.commands.common import Flag, Result, Word, WordPath, lines, plain, result
from lowbit.commands.inspect import tensor_table
from lowbit.errors import InputError
from lowbit.experiment import config as configs

# What a resumed run may have otherwise: more rows may join a sweep, each is kept by its name once it is measured.
MAY_DIFFER = ("rows",)


@dataclasses.dataclass(frozen=True)
class Run:
    """Run an experiment file.

    `lowbit run experiments/x.py --help` also lists the experiment's own options.
    """

    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]]
    """An experiment: a Python file with a docstring, a frozen dataclass Config and run(config, run)."""
    out: WordPath = None
    """Run directory (default: runs/NAME-FINGERPRINT, of all options but rows)."""
    resume: Flag = False
    """Continue the run in the run directory."""
    dry_run: Flag = False
    """Check everything and show what would be done; write nothing."""
    tracking: Word = None
    """wandb: online, offline or disabled (default: WANDB_MODE, else disabled)."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a report (table, quality-size plot, page) from results.

    PATHS are results.json files, JSON objects that lowbit eval --json printed, or folders with either.
    """

    paths: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]]
    out: Path
    """Folder for report.md, report.html, report.png, results.json and results.csv."""
    title: str = "Results"
    notes: str = ""
    """Text above the table."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.experiment import report

        rows = [row for path in self.paths for row in read_rows(path)]
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file (allowed: a folder)")
        paths = report.write_report(rows, self.out, self.title, self.notes)
        return result({"rows": len(rows), "files": list(paths.values())}, report.text_table(rows) + f"\n\n{self.out}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file: a JSON array of objects, or one object, whose name defaults to the file's."""
    if path.is_dir():
        found = [path / name for name in ("results.json", "summary.json") if (path / name).exists()]
        if not found:
            raise InputError(f"{path} holds no results (allowed: a folder with results.json or summary.json)")
        path = found[0]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"cannot read results {path}: {reason} (allowed: a JSON file)") from e
    rows = data if isinstance(data, list) else [data]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"results {path} hold {json.dumps(data)[:60]} (allowed: an object or an array of objects)")
    return [{"name": row.get("model") or path.parent.name or path.stem} | row for row in rows]


def main(argv: Sequence[str]) -> int:
    """`lowbit run`: the run's summary is the result."""
    own, rest = split(argv)
    if "--help" in argv or "-h" in argv or not rest or rest[0].startswith("-"):
        experiment = configs.load(rest[0]) if rest and not rest[0].startswith("-") else None
        try:
            configs.parse(Run, ["--help"] if "--help" in argv or "-h" in argv else [*own, *rest], "lowbit run")
        except SystemExit:
            if experiment is None:
                raise
        if experiment is not None:
            configs.parse(experiment.config, ["--help"], f"lowbit run {rest[0]}", _text(experiment.doc))
    options = configs.parse(Run, [rest[0], *own], "lowbit run")
    experiment = configs.load(options.file)
    taken = set(configs.options(Run)) & set(configs.options(experiment.config))
    if taken:
        raise InputError(f"experiment {options.file}: Config has {', '.join(sorted(taken))}, which lowbit run takes")
    config = configs.parse(experiment.config, rest[1:], f"lowbit run {options.file}", also=configs.options(Run))
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        done = _dry_run(experiment, config) if options.dry_run else _run(experiment, config, options, ["run", *argv])
    print(json.dumps(done.data, allow_nan=False) if options.json else done.text, flush=True)
    return 0


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `lowbit run` itself, wherever they stand, and the rest in order."""
    own: list[str] = []
    rest: list[str] = []
    flags, valued = {"--resume", "--dry-run", "--dry_run", "--json"}, {"--out", "--tracking"}
    words = iter(argv)
    for word in words:
        name = word.split("=")[0]
        if name in flags or (name in valued and "=" in word):
            own.append(word)
        elif name in valued:
            own += [word, *(v for v in [next(words, None)] if v is not None)]
        else:
            rest.append(word)
    return own, rest


def _run(experiment: configs.Experiment, config: Any, options: Run, argv: Sequence[str]) -> Result:
    from lowbit.experiment.run import Run as RunDirectory

    out = options.out or Path("runs") / f"{experiment.name}-{configs.fingerprint(config, MAY_DIFFER)[:8]}"
    start = time.monotonic()
    with RunDirectory.open(
        out,
        config,
        resume=options.resume,
        experiment=str(options.file),
        argv=argv,
        tracking=options.tracking,
        may_differ=MAY_DIFFER,
    ) as run:
        experiment.run(config, run)
        summary = run.summary(wall_seconds=round(time.monotonic() - start, 1))
    data = {"run": str(out), **summary}
    return result(data, lines({k: v for k, v in data.items() if not isinstance(v, dict | list)}))


def _dry_run(experiment: configs.Experiment, config: Any) -> Result:
    resolved = configs.to_json(config)
    text = _text(experiment.doc) + "\n\n" + lines(configs.flatten(resolved))
    plan = experiment.dry_run(config) if experiment.dry_run is not None else None
    if isinstance(plan, str):
        text += f"\n\n{plan}"
    elif plan is not None:
        flat = configs.flatten(plain(plan))
        tables = {k: v for k, v in flat.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        text += "\n\n" + lines({k: v for k, v in flat.items() if k not in tables})
        text += "".join(f"\n\n{name}\n{tensor_table(rows)}" for name, rows in tables.items())
    name = configs.fingerprint(config, MAY_DIFFER)
    return result({"dry_run": True, "config": resolved, "fingerprint": name, "plan": plan}, text)


def _text(doc: dict[str, str]) -> str:
    return "\n".join(f"{title}: {text}" for title, text in doc.items())

"""`open_model`: one function that reads every kind of model a command is given."""

import re
from importlib import resources
from pathlib import Path

from lowbit.errors import InputError
from lowbit.export.gguf_read import read_gguf
from lowbit.models.hf import load_hf, resolve
from lowbit.models.llama2c import load_llama2c
from lowbit.models.model import Model

ACCEPTED = (
    "a folder with config.json and safetensors, a run directory with model/, a .gguf file, a llama2.c .bin file, "
    "the name of a model in the package such as lowbit-base, or a hub id owner/name"
)


def open_model(source: str | Path) -> Model:
    """The model of a folder (plain or packed), a run directory, a GGUF or llama2.c file, a name in the package or a hub
    id. Raises `InputError` that says what is accepted."""
    folder = find_folder(source)
    if folder is None:
        return _file(Path(source))
    return load_hf(folder).replace(source=str(source)) if Path(source).is_dir() else load_hf(folder)


def find_folder(source: str | Path) -> Path | None:
    """The local Hugging Face folder of anything that `open_model` reads, fetched from the hub where need be; None for a
    file of another kind. Raises `InputError` like `open_model`."""
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _folder(path.parent) if path.suffix == ".safetensors" else None
    bundled = resources.files("lowbit") / "assets" / str(source)
    if re.fullmatch(r"[\w.-]+", str(source)) and (bundled / "config.json").is_file():
        return Path(str(bundled))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)):
        return resolve(source)
    raise InputError(f"no model {str(source)!r} (allowed: {ACCEPTED})")


def _folder(path: Path) -> Path:
    for candidate in (path / "model", path):  # a run directory has a config.json too, of the run
        if (candidate / "config.json").is_file():
            return candidate
        if (path / "run.json").is_file():  # its config.json is the run's, not a model's
            raise InputError(
                f"run directory {path} has no finished model, no model/config.json (allowed: a finished run; "
                "the command that started it continues it with --resume)"
            )
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise InputError(f"{path} is no model: it has no config.json and no model/ (it holds {found}; allowed: {ACCEPTED})")


def _file(path: Path) -> Model:
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return read_gguf(path)
    if path.suffix == ".bin":
        return load_llama2c(path)
    raise InputError(f"{path} is no model file (allowed: {ACCEPTED})")

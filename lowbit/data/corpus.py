"""Text: documents of a file, a folder or a hub data set, and the text that every Python installation carries."""

import ast
import importlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from lowbit.errors import InputError

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".raw", ".md", ".rst", ".py", ".jsonl")
Kind = Literal["prose", "code"]


class Tokenized(str):
    """A document with the token ids that it was decoded from, which encoding it again may not give back.

    `tokenizer` is the hash of theirs. Rows are made of the ids as they are: no BOS, no EOS is added.
    """

    ids: tuple[int, ...]
    tokenizer: str

    def __new__(cls, text: str, ids: Sequence[int], tokenizer: str) -> "Tokenized":
        self = super().__new__(cls, text)
        self.ids, self.tokenizer = tuple(ids), tokenizer
        return self


def read_utf8(path: str | Path) -> str:
    """A file's text with its line endings as they are. Raises `InputError` when it cannot be read or is no UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as e:
        raise InputError(f"cannot read text {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"text {path} has byte 0x{e.object[e.start]:02x} at offset {e.start} (allowed: UTF-8)") from e


def split_documents(text: str) -> list[str]:
    """The text between `<|endoftext|>` marks, stripped and without empty ones; the whole text if there is no mark."""
    if SEPARATOR not in text:
        return [text] if text.strip() else []
    return [d for d in map(str.strip, text.split(SEPARATOR)) if d]


def documents(path: str | Path, field: str = "text") -> Iterator[str]:
    """Documents of a UTF-8 file (split at `<|endoftext|>`), a `.jsonl` file (one a line, in `field`), or a folder.

    A line of a .jsonl file that has `tokens` and `tokenizer` beside its `text` (as `lowbit synthesize` writes them)
    becomes a `Tokenized` document. A folder is read recursively in sorted order, files with the suffixes in `SUFFIXES`
    only. Raises `InputError` for a missing path, a malformed line (named by number), a folder without text, or a text
    that is empty.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"folder {path} has no text (allowed: files named {', '.join('*' + s for s in SUFFIXES)})")
    else:
        files = [path]
    found = False
    for file in files:
        text = read_utf8(file)
        for doc in _jsonl(file, text, field) if file.suffix == ".jsonl" else split_documents(text):
            found = True
            yield doc
    if not found:
        raise InputError(f"text {path} is empty (allowed: at least one non-empty document)")


def _jsonl(file: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{file} line {number} is no JSON: {e.msg} (allowed: one object a line)") from e
        doc = value.get(field) if isinstance(value, dict) else None
        if not isinstance(doc, str):
            raise InputError(f"{file} line {number} has no string {field!r} (allowed: one object with it a line)")
        if field == "text" and "tokens" in value and isinstance(value.get("tokenizer"), str):
            ids = value["tokens"]
            if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise InputError(f"{file} line {number}: tokens (allowed: a list of token ids, at least one)")
            yield Tokenized(doc, ids, value["tokenizer"])
        elif doc.strip():
            yield doc


def hub_documents(name: str, split: str = "train", config: str | None = None, field: str = "text") -> Iterator[str]:
    """Documents of a hub data set (or of any name that `datasets.load_dataset` takes), streamed.

    Raises `InputError` in one line when it cannot be had (offline, unknown name or split) or lacks the field.
    """
    import datasets  # seconds to import

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        first = next(iter(rows), None)
    except Exception as e:  # the hub client raises many types, from httpx and its own; each becomes one line
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(
            f"cannot load data set {name!r} split {split!r}: {reason} (allowed: a reachable data set, or a file)"
        ) from e
    if first is None or not isinstance(first.get(field), str):
        have = "no rows" if first is None else f"fields {', '.join(sorted(first))}"
        raise InputError(f"data set {name!r} split {split!r} has {have} (allowed: a string field {field!r})")
    return (row[field] for row in rows if row[field].strip())


# -- the text of a Python installation --------------------------------------------------------------------------------

# Tests, bundled wheels, generated tables and lists of words that are no text to learn a language from.
_SKIP_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__", "lib2to3"}
_SKIP_DIRS |= {"encodings", "pydoc_data", "turtledemo", "__phello__"}
_SKIP_FILES = {"this.py", "antigravity.py", "_sysconfigdata.py"}
_MIN_PROSE = 400  # characters
_MIN_CODE = 400


def python_corpus(kinds: Sequence[Kind] = ("prose", "code")) -> list[str]:
    """Documents of the running Python's standard library, the same list for the same installation.

    Code is one document per module source. Prose is one document per `pydoc` topic, the licence, the long docstrings of
    modules and classes, and those of built-in types. A docstring that becomes a prose document is taken *out* of its
    module's code document, so the two kinds never hold the same words. About 9 MB of code and 1.5 MB of prose.
    """
    return [text for _, kind, text in python_documents() if kind in kinds]


def python_documents() -> Iterator[tuple[str, Kind, str]]:
    """`(name, kind, text)` of `python_corpus`, in a fixed order."""
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        if len(text) >= _MIN_PROSE:
            yield f"topic:{topic}", "prose", text.strip()
    yield from _licence()
    yield from _builtin_docs()
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _SKIP_DIRS & set(parts[:-1]) or parts[-1] in _SKIP_FILES or parts[-1].startswith("_sysconfigdata"):
            continue
        try:
            source = file.read_bytes().decode("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, OSError):
            continue  # a file in another encoding or a template: not text for us
        name = ".".join(parts)
        code, prose = _split_docstrings(source, tree)
        for i, text in enumerate(prose):
            yield f"doc:{name}:{i}", "prose", text
        if len(code.strip()) >= _MIN_CODE:
            yield f"code:{name}", "code", code.strip()


def _licence() -> Iterator[tuple[str, Kind, str]]:
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(sys.base_prefix)):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                yield "licence", "prose", read_utf8(folder / name).strip()
                return


def _builtin_docs() -> Iterator[tuple[str, Kind, str]]:
    """Docstrings of built-in modules and their classes: they are in no source file."""
    for module_name in sorted(sys.builtin_module_names):
        if module_name == "__main__":
            continue
        module = importlib.import_module(module_name)
        seen = [(module_name, module)]
        seen += [(f"{module_name}.{k}", v) for k, v in sorted(vars(module).items()) if inspect.isclass(v)]
        for name, value in seen:
            text = value.__dict__.get("__doc__")
            if isinstance(text, str) and len(text) >= _MIN_PROSE:
                yield f"builtin:{name}", "prose", inspect.cleandoc(text)


def _split_docstrings(source: str, tree: ast.Module) -> tuple[str, list[str]]:
    """The source without its long module and class docstrings, and those docstrings."""
    lines = source.splitlines(keepends=True)
    prose, cut = [], []
    for node in _statements(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef)):
            continue
        text = ast.get_docstring(node)
        if text is not None and len(text) >= _MIN_PROSE:
            prose.append((node.body[0].lineno, text.strip()))
            cut.append((node.body[0].lineno - 1, node.body[0].end_lineno))
    for start, stop in sorted(cut, reverse=True):
        del lines[start:stop]
    return "".join(lines), [text for _, text in sorted(prose)]


def pieces(text: str, size: int) -> list[str]:
    """A long text cut at paragraph ends into pieces of about `size` characters, so that a part can be held out."""
    out: list[str] = []
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            out.append(piece)
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    return [*out, piece] if piece.strip() else out


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without the expressions."""
    yield node
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield from _statements(child)

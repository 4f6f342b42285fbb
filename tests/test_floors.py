"""The order of the house (docs/architecture.md): imports point down, and help needs nothing heavy."""

import ast
import builtins
import dis
import re
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowbit"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)
GROUND = {"errors", "tree", "files", "xla"}  # below everything; they import only one another


def floors() -> dict[str, int]:
    """`{first name under lowbit: floor}`, 0 at the top, from the table in the architecture page."""
    table = (ROOT / "docs/architecture.md").read_text().split("## The house")[1].split("## ")[0]
    names = re.findall(r"(?m)^\| `([a-z_]+)(?:/|\.py)`", table)
    order = {name: i for i, name in enumerate(names)}
    return order | {"__main__": order["cli"]} | dict.fromkeys(GROUND, len(names))


FLOORS = floors()


def imports(source: str) -> list[tuple[int, str]]:
    """`(line, module)` of every import of lowbit in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "lowbit":
                found += [(node.lineno, f"lowbit.{a.name}") for a in node.names if a.name != "__version__"]
            else:
                found.append((node.lineno, node.module))
    return [(line, name) for line, name in found if name.startswith("lowbit.")]


def floor(module: str) -> int:
    """Floor of a dotted module; the package's own `__init__` may import only the ground."""
    first = module.split(".")[1] if "." in module else "errors"
    assert first in FLOORS, f"{module} is on no floor of docs/architecture.md"
    return FLOORS[first]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def violations(source: str, module: str) -> list[str]:
    return [
        f"{module}, line {line}: imports {name}, which lies above"
        for line, name in imports(source)
        if floor(name) < floor(module)
    ]


def test_every_folder_has_a_floor():
    top = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert top <= set(FLOORS), f"not in docs/architecture.md: {top - set(FLOORS)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert violations(path.read_text(), name_of(path)) == []


def test_no_circles_between_files():
    """Files of a floor may import one another, at import time, only without circles."""
    graph = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = set()
        for node in tree.body:  # imports inside functions run later and make no circle
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowbit"):
                names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names}
        graph[name_of(path)] = names
    graph = {
        m: {n for n in names if n in graph and n != m and not n == m.rpartition(".")[0]} for m, names in graph.items()
    }
    done, active = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in active, f"circle: {' -> '.join([*active[active.index(module) :], module])}"
        active.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(active.pop())

    for module in sorted(graph):
        visit(module)


def test_the_check_itself_can_fail():
    source = "def f():\n    from lowbit.train.loop import train\n    from lowbit import errors, qat\n"
    found = violations(source, "lowbit.formats.base")
    assert len(found) == 2 and "lowbit.train.loop" in found[0] and "lowbit.qat" in found[1]
    assert violations("from lowbit.plan import Plan\n", "lowbit.train.loop") == []
    assert violations("import lowbit.plan\n", "lowbit") != []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    """Every file is read in one sitting."""
    assert len(path.read_text().splitlines()) <= 600


IMPLICIT = {*dir(builtins), "__annotations__", "__doc__", "__file__", "__module__", "__name__", "__qualname__"}


def undefined(source: str) -> list[str]:
    """Names that functions read from their module, where nothing defines them (linters cannot tell them from the
    axes of jaxtyping's annotations)."""

    def stored(code: CodeType, how: tuple[str, ...]) -> set[str]:
        return {i.argval for i in dis.get_instructions(code) if i.opname in how}

    def walk(code: CodeType, known: set[str]) -> list[str]:
        own = stored(code, ("STORE_NAME",))
        read = stored(code, ("LOAD_GLOBAL", "LOAD_NAME"))
        inner = [c for c in code.co_consts if isinstance(c, CodeType)]
        return [*sorted(read - known - own), *(name for c in inner for name in walk(c, known))]

    code = compile(source, "source", "exec")
    return walk(code, IMPLICIT | stored(code, ("STORE_NAME", "STORE_GLOBAL")))


OTHERS = [p for name in ("experiments", "benchmarks", "tests") for p in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES + OTHERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_is_defined(path):
    assert undefined(path.read_text()) == []


def test_an_undefined_name_is_found():
    assert undefined("import os\ndef f(a):\n    b = a\n    return os, b, len(o.x)") == ["o"]
    assert undefined("class A:\n    x = 1\n    y = x\ndef f():\n    return A") == []

"""The rules of docs/architecture.md, checked on the source: imports, output, docstrings, sizes."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ldm_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each group may import the groups before it; rooms of one group never import one another.
GROUPS = (
    {"errors", "config", "reporting", "philox", "inputs", "storage", "manifest", "threads"},
    {"core", "data", "formats", "plots"},
    {"families"},
    {"training", "sampling", "evaluation", "lesson"},
    {"pictures"},
    {"recipe"},
    {"stages"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, group in enumerate(GROUPS) for room in group}
# The bottom holds no rooms but single modules, which may build on one another.
BOTTOM = GROUPS[0]

FORBIDDEN_LIBRARIES = {"numpy", "torchvision", "diffusers", "transformers", "pickle", "marshal", "shelve"}
# The rooms that may import each; matplotlib is slow to import.
ROOMS_OF_LIBRARY = {"typer": {"cli"}, "rich": {"cli"}, "click": {"cli"}, "matplotlib": {"plots", "lesson"}}
CORE_LIBRARIES = {"torch", "pydantic", "ldm_cli"}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_FILES_TO_LOSS = 8


def room_of(module: str) -> str:
    """`ldm_cli.core.models.clip` → `core`."""
    return module.split(".")[1] if "." in module else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Every imported name as written, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_violations(module: str, source: str) -> list[str]:
    """Imports that go up or sideways, and libraries that this room may not use."""
    room, found = room_of(module), []
    for imported in imported_modules(ast.parse(source)):
        library = imported.split(".")[0]
        other = room_of(imported)
        if imported.startswith("."):
            found.append(f"{module}: relative import {imported}")
        elif library in FORBIDDEN_LIBRARIES:
            found.append(f"{module} imports {library}")
        elif room not in (rooms := ROOMS_OF_LIBRARY.get(library, {room})):
            found.append(f"{module} imports {library}, which only {', '.join(sorted(rooms))} may")
        elif library == "ldm_cli" and other in LEVEL and room in LEVEL:
            sideways = LEVEL[other] == LEVEL[room] and other != room and room not in BOTTOM
            if LEVEL[other] > LEVEL[room] or sideways:
                found.append(f"{module} imports {imported}")
        elif library == "ldm_cli" and other not in {*LEVEL, "__version__"}:
            found.append(f"{module} imports {imported}, which is in no room")
        if room == "training" and imported.startswith("ldm_cli.core.models"):
            found.append(f"{module} imports {imported}: training knows no model")
        if room == "core" and library not in CORE_LIBRARIES and library not in sys.stdlib_module_names:
            found.append(f"{module} imports {library}: core is torch only")
    return found


def device_violations(module: str, source: str) -> list[str]:
    """CPU kernels and hand-written gradients outside core.cpu, and branches on the kind of device in core.models."""
    if module.startswith("ldm_cli.core.cpu"):
        return []
    names = {
        (node.lineno, ast.unparse(node)) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
    }
    in_models = module.startswith("ldm_cli.core.models")
    return [
        f"{module}:{line}: {name}"
        for line, name in sorted(names)
        if name in {"torch.ops", "torch.autograd.Function", "autograd.Function"}
        or (in_models and name.endswith((".device.type", ".is_cuda", ".is_cpu")))
    ]


def speech_violations(module: str, source: str) -> list[str]:
    """`print(…)`, `sys.stdout` and `sys.stderr` outside cli."""
    if room_of(module) == "cli":
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "input"}:
            found.append(f"{module}:{node.lineno}: {node.func.id}()")
        if isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr"}:
            found.append(f"{module}:{node.lineno}: .{node.attr}")
    return found


def docstring_violations(module: str, source: str) -> list[str]:
    """Modules, public classes, public functions and public methods of public classes without a docstring."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is None:
                found.append(f"{name}: no docstring")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and not child.name.startswith("_"):
                visit(child, f"{name}.{child.name}")

    visit(ast.parse(source), module)
    return found


def size_violations(module: str, source: str) -> list[str]:
    """Files too long to read in one sitting."""
    num_lines = source.count("\n")
    return [f"{module}: {num_lines} lines, more than {MAX_LINES}"] if num_lines > MAX_LINES else []


def function_violations(module: str, source: str) -> list[str]:
    """Functions that do not fit a screen; decorators do not count, nor do the options of a command, one a line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].lineno if module.startswith("ldm_cli.cli.") else node.lineno
            if (length := (node.end_lineno or 0) - first + 1) > MAX_FUNCTION_LINES:
                found.append(f"{module}.{node.name}: {length} lines, more than {MAX_FUNCTION_LINES}")
    return found


def cycles(sources: Mapping[str, str]) -> list[str]:
    """Groups of modules that import one another, by module name; lazy imports and TYPE_CHECKING count."""
    graph = {
        module: {
            # `from package import name` names a module of the package, or something in its __init__.
            imported if imported in sources else imported.rpartition(".")[0]
            for imported in imported_modules(ast.parse(source))
        }
        & sources.keys() - {module}
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def path_violations(text: str, sources: Mapping[str, str]) -> list[str]:
    """Errors in the documented path from the command to the loss: each file is imported by one before it, at most 8.

    Args:
        text: of docs/architecture.md; the path is its first section, a file per numbered line.
        sources: of all modules by name.
    """
    section = text.partition("\n## ")[2].partition("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/]+)\.py`", section, re.MULTILINE)
    modules = ["ldm_cli." + file.replace("/", ".") for file in files]
    if not 2 <= len(modules) <= MAX_FILES_TO_LOSS:
        return [f"{len(modules)} files from command to loss"]
    found = [f"{module} does not exist" for module in modules if module not in sources]
    reached: set[str] = {modules[0]}
    for module in modules:
        if module not in reached:
            found.append(f"no file before {module} imports it")
        for name in imported_modules(ast.parse(sources.get(module, ""))):
            reached |= {name, name.rpartition(".")[0]}
        if "ldm_cli.stages.trainer_stage" in reached:  # it imports the stage of a command by its name
            reached |= {name for name in sources if name.startswith("ldm_cli.stages.train_")}
    return found


CHECKS = (
    import_violations,
    device_violations,
    speech_violations,
    docstring_violations,
    size_violations,
    function_violations,
)


def test_the_package_was_found_with_all_its_rooms() -> None:
    assert len(MODULES) > 50
    assert {room_of(module_name(path)) for path in MODULES} - {""} == set(LEVEL)


@pytest.mark.parametrize("check", CHECKS)
def test_every_module_keeps_the_rule(check) -> None:  # type: ignore[no-untyped-def]
    violations = [v for path in MODULES for v in check(module_name(path), path.read_text(encoding="utf-8"))]
    assert violations == []


def test_no_modules_import_one_another() -> None:
    assert cycles({module_name(path): path.read_text(encoding="utf-8") for path in MODULES}) == []


def test_the_path_from_the_command_to_the_loss_is_as_documented() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in MODULES}
    assert path_violations(text, sources) == []


def test_a_wrong_path_to_the_loss_is_found() -> None:
    sources = {
        "ldm_cli.cli.train": "def f():\n    from ldm_cli.stages import train_vae",
        "ldm_cli.stages.train_vae": "from ldm_cli.core.vae_loss import VAELoss",
        "ldm_cli.core.vae_loss": "",
    }

    def violations(*files: str) -> int:
        lines = [f"{number}. `{file}`: text" for number, file in enumerate(files, 1)]
        return len(path_violations("# Title\n\n## Path\n" + "\n".join(lines) + "\n\n## Other\n1. `x.py`", sources))

    assert violations("cli/train.py", "stages/train_vae.py", "core/vae_loss.py") == 0
    assert violations("cli/train.py", "core/vae_loss.py") == 1
    assert violations("cli/train.py", "stages/train_unet.py") == 2
    assert violations(*["cli/train.py"] * 9) == 1


@pytest.mark.parametrize(
    "back",
    [
        "import ldm_cli.data.order",
        "from ldm_cli.data import order",
        "from ldm_cli.data.order import permuted",
        "def f():\n    from ldm_cli.data.order import permuted",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ldm_cli.data import order",
    ],
)
def test_a_planted_cycle_is_found(back: str) -> None:
    sources = {
        "ldm_cli.data.order": "from ldm_cli.data import shards",
        "ldm_cli.data.shards": "from ldm_cli.data.tar_index import TarIndex",
        "ldm_cli.data.tar_index": back,
    }
    (cycle,) = cycles(sources)
    assert all(module in cycle for module in sources)
    assert cycles({**sources, "ldm_cli.data.tar_index": "import torch"}) == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (import_violations, "ldm_cli.core.models.clip", "from ldm_cli.data.loader import Loader"),
        (import_violations, "ldm_cli.core.models.clip", "def f():\n    import ldm_cli.stages.dry_run"),
        (import_violations, "ldm_cli.core.clip_loss", "import safetensors"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli.evaluation.frechet import distance"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli.recipe import schema"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli import cli"),
        (import_violations, "ldm_cli.training.loop", "from ldm_cli.core.models.clip import CLIPModel"),
        (import_violations, "ldm_cli.data.loader", "import numpy as np"),
        (import_violations, "ldm_cli.stages.dry_run", "from rich.table import Table"),
        (import_violations, "ldm_cli.pictures.grid", "def f():\n    from matplotlib.figure import Figure"),
        (import_violations, "ldm_cli.stages.dry_run", "from . import options"),
        (import_violations, "ldm_cli.stages.dry_run", "from ldm_cli.utils import chunks"),
        (import_violations, "ldm_cli.errors", "from ldm_cli.core.models.clip import CLIPModel"),
        (device_violations, "ldm_cli.core.models.layers", "def f(x):\n    return x.device.type == 'cpu'"),
        (device_violations, "ldm_cli.core.models.layers", "def f(x):\n    return torch.ops.mkldnn.linear(x)"),
        (device_violations, "ldm_cli.core.diffusion.loss", "class F(torch.autograd.Function): ..."),
        (speech_violations, "ldm_cli.stages.dry_run", "print('hello')"),
        (speech_violations, "ldm_cli.stages.dry_run", "import sys\nsys.stderr.write('hello')"),
        (docstring_violations, "ldm_cli.stages.dry_run", "x = 1"),
        (docstring_violations, "ldm_cli.stages.dry_run", '"""Doc."""\ndef plan(): ...'),
        (docstring_violations, "ldm_cli.stages.dry_run", '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...'),
        (size_violations, "ldm_cli.stages.dry_run", "\n" * (MAX_LINES + 1)),
        (function_violations, "ldm_cli.stages.dry_run", "def f():\n" + MAX_FUNCTION_LINES * "    x = 1\n"),
        (
            function_violations,
            "ldm_cli.stages.dry_run",
            "class A:\n    async def f(self):\n" + MAX_FUNCTION_LINES * "        x = 1\n",
        ),
    ],
)
def test_a_planted_violation_is_found(check, module: str, source: str) -> None:  # type: ignore[no-untyped-def]
    assert len(check(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm_cli.core.models.clip", '"""Doc."""\nimport math\nimport torch\nfrom ldm_cli.core import clip_loss'),
        (
            "ldm_cli.stages.dry_run",
            '"""Doc."""\nfrom ldm_cli.data.loader import Loader\nfrom ldm_cli.stages.support import options',
        ),
        ("ldm_cli.core.cpu.linear", '"""Doc."""\nimport torch\n\n\ndef _f(x): return torch.ops.mkldnn.linear(x)'),
        ("ldm_cli.cli.show", '"""Doc."""\nimport rich\nfrom ldm_cli import __version__\nprint(1)\ndef _f(): ...'),
        ("ldm_cli.recipe.load", '"""Doc."""\nfrom ldm_cli.errors import LdmError'),
        ("ldm_cli.recipe.load", '"""Doc."""\ndef _f():\n' + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    ],
)
def test_clean_code_is_not_blamed(module: str, source: str) -> None:
    assert [violation for check in CHECKS for violation in check(module, source)] == []

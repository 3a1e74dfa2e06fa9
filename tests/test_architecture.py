"""The house rules, read off the source: who may import whom, who may speak, what must be explained."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ldm_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each group may import the groups before it; rooms of one group never import one another.
GROUPS = (
    {"errors", "config", "reporting", "philox", "storage", "threads"},
    {"core", "data", "formats"},
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
CLI_LIBRARIES = {"typer", "rich", "click"}
CORE_LIBRARIES = {"torch", "pydantic", "ldm_cli"}
MAX_LINES = 400


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
        elif library in CLI_LIBRARIES and room != "cli":
            found.append(f"{module} imports {library}, which only cli may")
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


def speech_violations(module: str, source: str) -> list[str]:
    """`print(…)`, `sys.stdout` and `sys.stderr` outside of cli."""
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


def processor_violations(module: str, source: str) -> list[str]:
    """Operators of one processor and hand-written gradients outside of core/cpu; branches on the device in models."""
    if module.startswith("ldm_cli.core.cpu"):
        return []
    words = ["torch.ops", "autograd.Function"]
    if module.startswith("ldm_cli.core.models"):
        words += [".device.type", ".is_cpu", ".is_cuda", ".is_meta"]
    lines = enumerate(source.splitlines(), start=1)
    return [f"{module}:{number}: {word}" for number, line in lines for word in words if word in line]


CHECKS = (import_violations, speech_violations, docstring_violations, size_violations, processor_violations)


def test_the_package_was_found_with_all_its_rooms() -> None:
    assert len(MODULES) > 50
    assert {room_of(module_name(path)) for path in MODULES} - {""} == set(LEVEL)


@pytest.mark.parametrize("check", CHECKS)
def test_every_module_keeps_the_rule(check) -> None:  # type: ignore[no-untyped-def]
    violations = [v for path in MODULES for v in check(module_name(path), path.read_text(encoding="utf-8"))]
    assert violations == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (import_violations, "ldm_cli.core.models.clip", "from ldm_cli.data.loader import Loader"),
        (import_violations, "ldm_cli.core.models.clip", "def f():\n    import ldm_cli.stages.support.dry_run"),
        (import_violations, "ldm_cli.core.clip_loss", "import safetensors"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli.evaluation.frechet import distance"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli.recipe import schema"),
        (import_violations, "ldm_cli.sampling.pipeline", "from ldm_cli import cli"),
        (import_violations, "ldm_cli.training.loop", "from ldm_cli.core.models.clip import CLIPModel"),
        (import_violations, "ldm_cli.data.loader", "import numpy as np"),
        (import_violations, "ldm_cli.stages.support.dry_run", "from rich.table import Table"),
        (import_violations, "ldm_cli.stages.support.dry_run", "from . import options"),
        (import_violations, "ldm_cli.stages.support.dry_run", "from ldm_cli.utils import chunks"),
        (import_violations, "ldm_cli.errors", "from ldm_cli.core.models.clip import CLIPModel"),
        (speech_violations, "ldm_cli.stages.support.dry_run", "print('hello')"),
        (speech_violations, "ldm_cli.stages.support.dry_run", "import sys\nsys.stderr.write('hello')"),
        (docstring_violations, "ldm_cli.stages.support.dry_run", "x = 1"),
        (docstring_violations, "ldm_cli.stages.support.dry_run", '"""Doc."""\ndef plan(): ...'),
        (
            docstring_violations,
            "ldm_cli.stages.support.dry_run",
            '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...',
        ),
        (processor_violations, "ldm_cli.core.vae_loss", "y = torch.ops.mkldnn._linear_pointwise(x)"),
        (processor_violations, "ldm_cli.training.optim", "class A(torch.autograd.Function): ..."),
        (processor_violations, "ldm_cli.core.models.layers", "if x.device.type == 'cpu': ..."),
        (size_violations, "ldm_cli.stages.support.dry_run", "\n" * (MAX_LINES + 1)),
    ],
)
def test_a_planted_violation_is_found(check, module: str, source: str) -> None:  # type: ignore[no-untyped-def]
    assert len(check(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ldm_cli.core.models.clip",
            '"""Doc."""\nimport math\nimport torch\nfrom ldm_cli.core import clip_loss',
        ),
        (
            "ldm_cli.stages.support.dry_run",
            '"""Doc."""\nfrom ldm_cli.data.loader import Loader\nfrom ldm_cli.stages.support import options',
        ),
        (
            "ldm_cli.cli.show",
            '"""Doc."""\nimport rich\nfrom ldm_cli import __version__\nprint(1)\ndef _f(): ...',
        ),
        ("ldm_cli.recipe.load", '"""Doc."""\nfrom ldm_cli.errors import LdmError'),
    ],
)
def test_clean_code_is_not_blamed(module: str, source: str) -> None:
    assert [violation for check in CHECKS for violation in check(module, source)] == []

"""Write docs/reference/ from the words of the program: `--help`, the docstrings of recipes, the messages of errors.

    python scripts/reference.py           # writes the pages, and deletes those that are none any more
    python scripts/reference.py --check   # exit code 1 if a page is not current

A page a command, `recipes.md` with the sections of recipes, and `messages.md` with the errors. Never edit them by hand.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import operator
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ldm_cli import errors
from ldm_cli.cli.app import program
from ldm_cli.cli.examples import EXAMPLES
from ldm_cli.errors import LdmError
from ldm_cli.recipe.schema import RECIPES
from ldm_cli.recipe.shipped import shipped_recipes
from ldm_cli.recipe.yaml_source import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
WIDTH = 80
OF_A_BUG = """
A bug of ldm, not a mistake of yours: `unexpected ERROR: …`. The message names a file with the traceback, the versions
and the arguments: please report the bug with it. `--debug` shows the traceback at once.
"""


@functools.cache
def pages() -> dict[str, str]:
    """File name → text, of every page."""
    found = {f"{name}.md": _command_page(name, command) for name, command in program().commands.items()}
    return {**found, "recipes.md": _sections_page(), "messages.md": _messages_page()}


def _command_page(name: str, command: Any) -> str:
    lines = [f"# ldm {name}", "", *_wrapped(command.help)]
    if (ROOT / "docs" / f"{name}.md").is_file():
        lines += ["", *_wrapped(f"How it works, with examples: [{name}](../{name}.md).")]
    for inner, subcommand in getattr(command, "commands", {"": command}).items():
        if inner:
            lines += ["", f"## {inner}", "", *_wrapped(subcommand.help)]
        lines += ["", "```text", _usage(f"ldm {name} {inner}".strip(), subcommand), "```", ""]
        for parameter in subcommand.params:
            if not parameter.hidden:
                lines += _bullet(_parameter_name(parameter), _parameter_text(parameter))
        lines += ["", "```sh", *(f"ldm {line}" for line in EXAMPLES[f"{name} {inner}".strip()]), "```"]
    if name in RECIPES:
        lines += _recipe_part(name)
    return "\n".join(lines) + "\n"


def _usage(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [
        _optional(p.metavar or p.name.upper(), not p.required) + ("..." if p.nargs == -1 else "") for p in arguments
    ]
    return " ".join([name, "[OPTIONS]", *words])


def _optional(text: str, is_optional: bool) -> str:
    return f"[{text.strip('[]')}]" if is_optional else text


def _parameter_name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = [*parameter.opts, *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {parameter.metavar or 'TEXT'}"
    return ", ".join(f"`{name}{value if name == names[-1] else ''}`" for name in names)


def _parameter_text(parameter: Any) -> str:
    text = parameter.help or ""
    if parameter.show_default and parameter.default not in (None, False):
        text += f" Default: `{parameter.default}`."
    return _escaped(text)


def _recipe_part(command: str) -> list[str]:
    """The fields of a command's recipe, and its shipped recipes."""
    schema = TypeAdapter(RECIPES[command]).json_schema()
    lines = ["", "## Recipe", "", *_wrapped("Its sections are described in [recipes](recipes.md)."), ""]
    lines += [line for name, field in schema["properties"].items() for line in _field(name, field, schema)]
    shipped = [(name, path.read_text(encoding="utf-8")) for name, path in shipped_recipes().items()]
    ours = [(name, text) for name, text in shipped if parse_yaml(text).data["command"] == command]
    lines += ["", "Shipped recipes:", ""]
    for name, text in ours:
        lines += _bullet(f"`{name}`", _escaped(text.partition("\n")[0].lstrip("# ")))
    return lines


def _sections_page() -> str:
    kinds = functools.reduce(operator.or_, RECIPES.values())
    schema = TypeAdapter(kinds).json_schema()
    sections = {name: section for name, section in schema["$defs"].items() if not name.endswith("Recipe")}
    lines = ["# Sections of recipes", ""]
    lines += _wrapped(
        "A recipe is a YAML file; a section is a field with fields of its own, such as `train` or `data`. Every field "
        "is listed with its type and its default. `ldm recipe schema` prints the same for editors."
    )
    for name, section in sorted(sections.items()):
        lines += ["", f"## {name}", "", *_wrapped(_escaped(section.get("description", ""))), ""]
        required = section.get("required", [])
        for field, properties in section.get("properties", {}).items():
            lines += _field(field, properties, section, field in required)
    return "\n".join(lines) + "\n"


def _field(name: str, field: dict[str, Any], schema: dict[str, Any], required: bool | None = None) -> list[str]:
    needed = name in schema.get("required", []) if required is None else required
    plain = not needed and not isinstance(field.get("default", {}), dict)
    default = f"; default `{_short(field['default'])}`" if plain else ""
    kind = "required; " + _type(field) if needed else _type(field)
    return _bullet(f"`{name}`", f"({kind}{default}) {_escaped(field.get('description', ''))}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else "…"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](recipes.md#{name.lower()})"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(_type(one) for one in field.get("anyOf") or field["oneOf"])
    kind = {"string": "text", "integer": "whole number", "boolean": "true or false", "array": "list"}
    text = kind.get(field.get("type", ""), field.get("type", "any"))
    if field.get("type") == "array" and field.get("items"):
        text = f"list of {_type(field['items'])}"
    return text + _range(field)


def _range(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return f" {', '.join(bounds)}" if bounds else ""


def _messages_page() -> str:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, LdmError)]
    lines = ["# Messages", ""]
    lines += _wrapped(
        "An error is one last line on stderr, `ldm: error: WHAT: CAUSE; REMEDY [E-TAG]`. Here are the messages by tag, "
        "with `…` for names and numbers, and the remedy after the arrow. Search for a few words of yours."
    )
    messages = _messages()
    for kind in sorted(kinds, key=lambda one: (one.code, one.tag)):
        words = OF_A_BUG if kind is LdmError else inspect.getdoc(kind) or ""
        lines += ["", f"## {kind.tag} (code {kind.code})", "", *_wrapped(_escaped(words)), ""]
        for what, remedy in sorted(messages.get(kind.__name__, ())):
            lines += _bullet(_code(what), f"→ {_escaped(remedy)}" if remedy else "")
    return "\n".join(lines) + "\n"


@functools.cache
def _messages() -> dict[str, set[tuple[str, str]]]:
    """Name of an error's class → its messages in the package, each with its remedy or an empty text."""
    found: dict[str, set[tuple[str, str]]] = {}
    names = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, LdmError)}
    for path in sorted((ROOT / "ldm_cli").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names and call.args:
                parts = [*map(_template, call.args[:3]), *[""] * (3 - len(call.args[:3]))]
                remedies = [_template(keyword.value) for keyword in call.keywords if keyword.arg == "remedy"]
                what = parts[0] + (f": {parts[1]}" if parts[1].strip("… '") else "")
                if len(re.findall(r"\w{2,}", what)) >= 2:
                    found.setdefault(call.func.id, set()).add((what, (remedies or [parts[2]])[0].strip("…")))
    return found


def _template(node: ast.expr) -> str:
    """The text of a string in the source, with `…` for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if fence == "``" else f"`{text}`"


def _escaped(text: str) -> str:
    """Text whose `<`, `*` and `_` mean themselves in Markdown, outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*\[])", r"\\\1", part) for part in parts)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join((text or "").split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def _bullet(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"- {name} {text}".rstrip(), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def changed() -> Iterator[Path]:
    """The pages that are not as they would be written."""
    wanted = pages()
    for name, text in wanted.items():
        path = FOLDER / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield path
    yield from (path for path in FOLDER.glob("*.md") if path.name not in wanted)


def main() -> int:
    """Write the pages, or with `--check` name those that are not current."""
    found = list(changed())
    if "--check" in sys.argv[1:]:
        print(*found, sep="\n")
        return 1 if found else 0
    FOLDER.mkdir(exist_ok=True)
    for path in found:
        if path.name in pages():
            path.write_text(pages()[path.name], encoding="utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""README.md and docs/ say what is true: their commands run, their options, fields, recipes and links exist.

What a fenced block is, its first line says:

    sh               every `ldm` line names a command, options and a recipe that exist
    sh run           it is executed, too: all such blocks in the order of `PAGES`, in one folder; exit code 0
    sh run exit=78   … with this exit code
    text exact       these lines occur, in this order, in what the block before printed; blanks count as one, and
                     `…` at the end of a line stands for its rest
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ldm_cli import __version__, errors
from ldm_cli.cli.app import program
from ldm_cli.cli.failures import user_error
from ldm_cli.data.config import DataConfig
from ldm_cli.errors import InputNotFoundError, LdmError, RecipeError, UsageError
from ldm_cli.recipe.load import load_recipe, load_section
from ldm_cli.recipe.schema import RECIPES
from ldm_cli.recipe.shipped import shipped_recipes
from ldm_cli.recipe.yaml_source import parse_yaml
from tests.conftest import REPOSITORY
from tests.data.walks import write_img2dataset, write_phone
from tests.fork_server import client
from tests.stages.published_xl import write_published_xl

NAMES = (
    "train-clip",
    "train-vae",
    "train-unet",
    "precompute",
    "train-ar",
    "train-prior",
    "unclip",
    "convert",
    "sample",
    "samplers",
    "stable-diffusion-xl",
    "stable-diffusion-3",
    "edit",
    "upscale",
    "pixels",
    "lora",
    "image-prompts",
    "foreign-models",
    "eval",
    "compare",
    "report",
    "study",
    "gallery",
    "ablations",
    "clip",
    "spiral",
    "data",
    "recipe",
    "pull",
    "distributed",
    "faults",
    "performance",
    "architecture",
)
GUIDES = (
    "your-photos",
    "fine-tune",
    "many-gpus",
    "sampler-and-guidance",
    "measure",
    "resume-move-delete",
    "memory-and-time",
    "bad-pictures",
    "when-something-fails",
    "add-a-loss-or-model",
)
DOCS = REPOSITORY / "docs"
PAGES = (
    REPOSITORY / "README.md",
    DOCS / "guides/first-model.md",  # trains the models of all other pages
    *(DOCS / f"{name}.md" for name in NAMES[:-1]),
    *(DOCS / f"guides/{name}.md" for name in GUIDES),
    DOCS / "architecture.md",
)
CHINESE = REPOSITORY / "README.zh.md"
WRITTEN_BY_THE_TOUR = (
    "data/demo/train-000000.tar",
    "runs/demo-clip/model/model.safetensors",
    "runs/demo-clip/model/preprocessor_config.json",
    "runs/demo-vae/model/diffusion_pytorch_model.safetensors",
    "runs/demo-unet/model/model_index.json",
    "runs/demo-unet/samples/step-00000010/grid.png",
    "samples/a-red-circle-*/00002-a-blue-star-0.png",
    "samples/a-red-circle-*/grid.png",
    "samples/a-red-circle-*/images.json",
    "runs/demo-eval/eval.json",
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, what it is, what it says."""

    place: str
    info: str
    text: str

    @property
    def exit_code(self) -> int:
        found = re.search(r"exit=(\d+)", self.info)
        return int(found[1]) if found else 0

    @property
    def commands(self) -> list[list[str]]:
        """The words of each `ldm` line, `ldm` and what is redirected left out."""
        lines = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        ours = [words[1:] for words in lines if words and Path(words[0]).name == "ldm"]
        return [words[: words.index(">")] if ">" in words else words for words in ours]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{page.name}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2]) for m in found]


def shell_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.info.split()[:1] == ["sh"]]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def check_command(words: list[str], valid_recipe: bool = True) -> None:
    """Raise what the program would say of a command line, without running it."""
    command = program()
    context, path = command.make_context("ldm", list(words)), []
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words))
        path.append(name)
    given = context.params
    names = [given["recipe"]] if "recipe" in given else given.get("arguments") or []
    changes = [*(given.get("overrides") or []), *(name for name in names if "=" in name)]
    names = [name for name in names if "=" not in name]
    if path[0] == "data":
        load_section(DataConfig, [*changes, "shards=x"], [])
        return
    for name in names:
        if valid_recipe and not (name.endswith(".yaml") and path[0] == "recipe"):  # made by the block itself
            load_recipe(name, changes, {"recipe": None, "bench": None, "precompute": None}.get(path[0], path[0]))


def complaint_about(words: list[str]) -> LdmError | None:
    try:
        check_command(words)
    except Exception as error:
        return user_error(error)
    return None


def test_every_page_of_the_documentation_is_read() -> None:
    assert {*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")} == set(PAGES[1:])


def test_the_readme_leads_to_every_page_and_names_every_command() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(REPOSITORY)})" not in readme] == []
    assert [name for name in program().commands if f"`ldm {name}" not in readme] == []


def test_there_are_commands_on_every_page_but_the_last() -> None:
    pages = {page.name: [block for block in blocks(page) if block.info[:2] == "sh"] for page in PAGES}
    num_commands = {name: sum(len(block.commands) for block in found) for name, found in pages.items()}
    assert num_commands.pop("architecture.md") == 0
    assert min(num_commands.values()) >= 2
    assert sum(num_commands.values()) >= 35
    assert sum(" run" in block.info for block in shell_blocks()) >= 14


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: block.place)
def test_every_command_option_and_recipe_exists(block: Block) -> None:
    for words in block.commands:
        check_command(words, valid_recipe=block.exit_code == 0)


@pytest.mark.parametrize(
    "line",
    [
        "trian-clip demo/clip",
        "data snyth out",
        "train-clip demo/clip --otu x",
        "train-clip demo/clpi",
        "train-clip demo/vae",
        "train-clip demo/clip train.stpes=3",
        "sample --model m -p x --steps many",
        "data check shards captoin=txt",
        "recipe show demo/clip --resovled",
    ],
)
def test_a_slip_in_a_command_is_noticed(line: str) -> None:
    assert isinstance(complaint_about(line.split()), UsageError | RecipeError | InputNotFoundError)


def test_no_block_is_of_an_unknown_kind() -> None:
    kinds = {block.info for page in PAGES for block in blocks(page)}
    codes = {kind for kind in kinds if re.fullmatch(r"sh run exit=\d+", kind)}
    assert kinds - codes == {"sh", "sh run", "text", "text exact", "python", "math", "yaml", "json"}
    assert len(codes) >= 3


def test_the_python_of_the_first_guide_compiles() -> None:
    (block,) = [block for block in blocks(PAGES[1]) if block.info == "python"]
    compile(block.text, block.place, "exec")
    assert "runs/demo-unet/model" in block.text


def width(line: str) -> int:
    """Columns of a terminal that a line takes: two for a Chinese character."""
    return len(line) + sum(unicodedata.east_asian_width(character) in "WF" for character in line)


@pytest.mark.parametrize("page", [*PAGES, CHINESE, *DOCS.glob("reference/*.md")], ids=lambda page: page.name)
def test_a_page_fits_into_eighty_columns(page: Path) -> None:
    """Tables and blocks, too. Only a word that cannot be broken, such as an address, may be longer."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if width(line) > 80 and " " in line.strip().removeprefix("- ")] == []


def test_the_chinese_readme_has_the_sections_commands_links_and_codes_of_the_english_one() -> None:
    def outline(page: Path) -> list[object]:
        text = page.read_text(encoding="utf-8")
        commands = [re.sub(r" +#.*", "", block.text) for block in blocks(page) if block.info != "text"]
        files = [re.findall(r"^  [^ ].*?(?=  |$)", block.text, re.MULTILINE) for block in blocks(page)]
        links = re.findall(r"\]\(([^)\s]+)\)", prose(page))[1:]  # but that to the other language
        codes = re.findall(r"^\| (\d[\d /]*) \|", text, re.MULTILINE)
        return [re.findall(r"^#+", prose(page), re.MULTILINE), commands, files, links, codes]

    assert outline(CHINESE) == outline(PAGES[0])


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = parse_yaml((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")).data
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")


@pytest.mark.parametrize("page", [*PAGES, CHINESE], ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_every_file_of_tests_and_benchmarks_named_in_the_text_exists() -> None:
    spans = {(page.name, span) for page in PAGES for span in re.findall(r"`([\w/*]+/[\w/*.]*)`", prose(page))}
    named = {(page, span) for page, span in spans if span.startswith(("tests/", "benchmarks/")) or "/test_" in span}
    assert len(named) >= 30
    missing = []
    for page, span in sorted(named):
        file = span if span.endswith((".py", "/")) else f"tests/{span}.py"
        if not [*REPOSITORY.glob(file.removesuffix("/"))]:
            missing.append(f"{page}: {span}")
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fields_of(model: Any) -> set[str]:
    """Dotted names of the fields of a recipe: `train`, `train.lr`, …"""
    found = set()
    for name, field in model.model_fields.items():
        parts = configs_in(field.annotation)
        found |= {name, *(f"{name}.{inner}" for part in parts for inner in fields_of(part))}
    return found


def configs_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for part in get_args(annotation) for config in configs_in(part)]


def test_every_field_named_in_the_text_exists() -> None:
    fields = set().union(*map(fields_of, RECIPES.values()))
    sections = {name.split(".")[0] for name in fields if "." in name}
    named = [
        (page.name, span)
        for page in PAGES
        for span in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:\.\*)?(?:=[^`]*)?`", prose(page))
        if span.split(".")[0] in sections and not span.endswith((".json", ".yaml", ".jsonl"))
    ]
    assert len(named) >= 50
    assert [entry for entry in named if entry[1] not in fields] == []


def test_every_recipe_named_in_the_text_is_shipped_and_every_shipped_one_is_named() -> None:
    families = "|".join({name.split("/")[0] for name in shipped_recipes()})
    pages = [*PAGES, *DOCS.glob("reference/*.md")]
    spans = {s for page in pages for s in re.findall(rf"`((?:{families})/[a-z0-9-]+)`", prose(page))}
    assert spans == set(shipped_recipes())


def test_the_readme_lists_every_exit_code() -> None:
    section = PAGES[0].read_text(encoding="utf-8").split("## Exit codes")[1].split("##")[0]
    listed = {int(code) for code in re.findall(r"\| (\d+) (?:/ \d+ )?(?=\|)", section)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LdmError)]
    assert len(kinds) >= 13
    assert {kind.code for kind in kinds} - listed == set()
    assert {0, 130, 141} <= listed


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[[Block], list[str]]]:
    """Runs a block in an empty folder where `ldm` is this very package; returns the lines it prints."""
    program, home, server = tmp_path / "bin" / "ldm", tmp_path / "home", tmp_path / "server"
    program.parent.mkdir()
    home.mkdir()
    write_phone(home / "phone")
    write_img2dataset(home / "downloads")
    write_published_xl(home / "sdxl")
    program.write_text(client(server))
    program.chmod(0o755)
    program.with_name("python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.with_name("python").chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    serving = subprocess.Popen([sys.executable, "-m", "tests.fork_server", str(server)], env=environment)
    while not server.exists():
        assert serving.poll() is None
        time.sleep(0.01)

    def run(block: Block) -> list[str]:
        command = ["bash", "-eu", "-c", block.text]
        result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        assert result.returncode == block.exit_code, f"{block.place}: {result.stderr}"
        return (result.stdout + result.stderr).splitlines()

    yield run
    serving.kill()
    serving.wait()


def missing(expected: str, printed: list[str]) -> list[str]:
    """Lines of `expected` that do not occur, in their order, in what was printed; blanks count as one."""
    said = iter([" ".join(line.split()) for line in printed])
    wanted = {line: " ".join(line.split()).removesuffix(" …") for line in expected.splitlines()}
    return [line for line, words in wanted.items() if not any(words in one for one in said)]


def test_lines_count_as_printed_only_in_their_order() -> None:
    assert missing("a  1\nb 2\n", ["x", " a 1 !", "b   2"]) == []
    assert missing("b 2\na 1\n", ["a 1", "b 2"]) == ["a 1"]
    assert missing("c\n", ["a 1"]) == ["c"]
    assert missing("a 1 …\n", ["a 1 b"]) == []
    assert missing("a 2 …\n", ["a 1 2"]) == ["a 2 …"]


@pytest.mark.slow
@pytest.mark.longest
def test_what_is_marked_to_be_run_runs_and_prints_what_the_page_says(
    tmp_path: Path, shell: Callable[[Block], list[str]]
) -> None:
    printed: list[str] = []
    num_compared = 0
    for block in [block for page in PAGES for block in blocks(page)]:
        if block.info.startswith("sh run"):
            printed = shell(block)
        elif block.info == "text exact":
            num_compared += 1
            assert missing(block.text, printed) == [], f"{block.place}: {printed}"
    assert num_compared >= 11
    assert [name for name in WRITTEN_BY_THE_TOUR if not [*(tmp_path / "home").glob(name)]] == []

"""`ldm sample` with adapters: weights by option, recipe and tag; what is recorded; what repeats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_cli.cli.app import run as ldm
from ldm_cli.core.low_rank import LowRank
from ldm_cli.errors import CheckpointError, InputNotFoundError, UsageError
from ldm_cli.families.adapted import adaptable_networks
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert
from ldm_cli.storage import file_sha256
from tests.formats.web_ui import parse_parameters
from tests.sampling.tiny import tiny_pipeline
from tests.stages.test_sample import draw, repeat
from tests.stages.tiny_xl import save_tiny_xl

PROMPT = "a red circle"


def write_adapters(model: Path, path: Path, seed: int, **components: str) -> Path:
    """Adapters of every attention projection of the networks; returns their path."""
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, dict[str, LowRank]] = {}
    for component, network in adaptable_networks(open_family(model)).items():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v", "q_proj", "v_proj")):
                down = torch.randn(2, module.in_features, generator=generator)
                up = torch.randn(module.out_features, 2, generator=generator) / 4
                adapters.setdefault(component, {})[name] = LowRank(down, up, 1.0)
    write_lora(path, adapters, "kohya", {})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().family.save(folder)
    return folder


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: str(write_adapters(model, folder / f"{name}.safetensors", i)) for i, name in enumerate("ab")}


def pictures(result: dict[str, Any]) -> list[bytes]:
    return [read_image(Path(image["file"])).numpy().tobytes() for image in result["images"]]


def test_one_job_with_and_without_tags_gives_the_pictures_of_a_job_each(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    prompts = [PROMPT, f"{PROMPT} <lora:a:0.5>", PROMPT, f"<lora:b> {PROMPT} <lora:a:-1>"]
    available = [{"path": path, "weight": 0.0} for path in files.values()]
    together = pictures(draw(model, tmp_path / "all", prompts=prompts, loras=available))
    weights: list[dict[str, float]] = [{}, {"a": 0.5}, {}, {"a": -1.0, "b": 1.0}]
    for i, own in enumerate(weights):
        loras = [{"path": files[name], "weight": weight} for name, weight in own.items()]
        assert pictures(draw(model, tmp_path / str(i), loras=loras)) == [together[i]]
    assert len({*together}) == 3
    assert together[0] == together[2]


@pytest.mark.parametrize("wish", [{"prompts": [f"{PROMPT} <lora:a:0.25><lora:a:0.25>"]}, {"prompts": [PROMPT]}])
def test_weights_of_one_name_add_up(model: Path, files: dict[str, str], tmp_path: Path, wish: dict[str, Any]) -> None:
    shared = 0.0 if "<" in wish["prompts"][0] else 0.5
    found = pictures(draw(model, tmp_path / "sum", loras=[{"path": files["a"], "weight": shared}], **wish))
    expected = draw(model, tmp_path / "one", prompts=[f"{PROMPT} <lora:a:0.5>"], lora_dir=str(Path(files["a"]).parent))
    assert found == pictures(expected)


def test_xl_takes_adapters_and_words_of_both_text_encoders_as_merged_weights_do(tmp_path: Path) -> None:
    xl, merged, file, word = (tmp_path / name for name in ("xl", "merged", "x.safetensors", "toy.safetensors"))
    save_tiny_xl(xl)
    write_adapters(xl, file, 3)
    assert {name.split("_")[1] for name in load_file(file)} == {"unet", "te1", "te2"}
    convert.run(xl, merged, convert.ConvertOptions(loras=((file, 1.0),)), SilentReporter())
    generator = torch.Generator().manual_seed(4)
    save_file({name: torch.randn(2, n, generator=generator) for name, n in (("clip_l", 8), ("clip_g", 16))}, word)
    prompts, given = ["a toy", PROMPT], {"embeddings": [{"path": str(word)}]}
    wishes = [prompt + tag for prompt in prompts for tag in ("", "<lora:x>")]
    found = pictures(draw(xl, tmp_path / "out", prompts=wishes, lora_dir=str(tmp_path), **given))
    assert len({*found}) == 4
    assert pictures(draw(merged, tmp_path / "expected", prompts=prompts, **given)) == [found[1], found[3]]
    plain = pictures(draw(xl, tmp_path / "plain", prompts=prompts))
    assert plain[0] != found[0]
    assert plain[1] == found[2]


def test_a_grid_of_settings_keeps_the_tags_of_its_prompts(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    loras = [{"path": path, "weight": 0.0} for path in files.values()]
    prompts = [f"{PROMPT} <lora:a:0.5>", f"{PROMPT} <lora:b>"]
    found = draw(model, tmp_path / "grid", prompts=prompts, loras=loras, xy=["steps=1,2"])
    expected = [
        pictures(draw(model, tmp_path / str(steps), prompts=prompts, loras=loras, sampling={"steps": steps}))
        for steps in (1, 2)
    ]
    assert pictures(found) == [expected[steps][i] for i in (0, 1) for steps in (0, 1)]


def test_a_walk_changes_weights_as_it_changes_words(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    prompts = [f"{PROMPT} <lora:a:1>", "a blue square"]
    loras = [{"path": files["a"], "weight": 0.0}]
    walk = draw(model, tmp_path / "walk", prompts=prompts, interpolate=2, loras=loras)
    records = [read_provenance(Path(image["file"])) for image in walk["images"]]
    assert [record.get("loras") for record in records] == [{"a": 1.0}, {"a": 0.5}, None]
    ends = pictures(draw(model, tmp_path / "ends", prompts=prompts, loras=loras, sampling={"seed": 0}))
    assert pictures(walk)[0] == ends[0]


def test_what_was_used_is_recorded_and_read_by_web_uis(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    prompts = [f"{PROMPT} <lora:a:0.5>", PROMPT]
    result = draw(model, tmp_path / "out", prompts=prompts, loras=[{"path": p, "weight": 0.0} for p in files.values()])
    job = json.loads((tmp_path / "out/images.json").read_text())
    assert [image["prompt"] for image in job["images"]] == [PROMPT, PROMPT]
    assert [image.get("loras") for image in job["images"]] == [{"a": 0.5}, None]
    assert job["job"]["lora_sha256"] == {"a": file_sha256(Path(files["a"]))}
    texts = [Image.open(image["file"]).info["parameters"] for image in result["images"]]
    first, second = (parse_parameters(text) for text in texts)
    assert first["Prompt"] == f"{PROMPT} <lora:a:0.5>"
    assert first["Lora hashes"] == f"a: {file_sha256(Path(files['a']))[:8]}"
    assert second["Prompt"] == PROMPT
    assert "Lora hashes" not in second


def test_a_picture_with_adapters_is_repeated_and_changed_files_are_refused(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    for name, path in files.items():
        shutil.copy(path, tmp_path / f"{name}.safetensors")
    prompts = [PROMPT, f"<lora:b:0.3>{PROMPT}<lora:a:0.5>"]
    result = draw(model, tmp_path / "out", prompts=prompts, lora_dir=str(tmp_path))
    picture = Path(result["images"][1]["file"])
    again, _ = repeat(picture, tmp_path / "again")
    assert Path(again).read_bytes() == picture.read_bytes()
    write_adapters(model, tmp_path / "b.safetensors", 9)
    with pytest.raises(CheckpointError, match="the adapters 'b' have changed since"):
        repeat(picture, tmp_path / "changed")


def test_unknown_names_name_their_neighbours(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(files["a"], tmp_path / "watercolor.safetensors")
    with pytest.raises(UsageError, match="no adapters are named 'watercolour': there is watercolor; add --lora"):
        draw(model, tmp_path / "out", prompts=["x <lora:watercolour:1>"], lora_dir=str(tmp_path))
    for weight in ("1:2", "nan", "inf", "x"):
        with pytest.raises(UsageError, match=f"'<lora:watercolor:{weight}>' is not understood: one number is read"):
            draw(model, tmp_path / "out", prompts=[f"x <lora:watercolor:{weight}>"], lora_dir=str(tmp_path))
    for prompt in ("x <lora:watercolor", "x <lora:watercolor:1> <LoRA:a:<b>>"):
        with pytest.raises(UsageError, match=r"'<[^<]*(watercolor|<b>>)' is not understood: the tag has no end"):
            draw(model, tmp_path / "out", prompts=[prompt], lora_dir=str(tmp_path))
    with pytest.raises(UsageError, match="two adapters are named 'a'"):
        draw(model, tmp_path / "out", loras=[{"path": files["a"]}, {"path": files["a"]}])
    with pytest.raises(InputNotFoundError, match=r"no adapters in '.*nothing"):
        draw(model, tmp_path / "out", loras=[{"path": str(tmp_path / "nothing")}])
    with pytest.raises(InputNotFoundError, match="check --lora-dir"):
        draw(model, tmp_path / "out", lora_dir=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


def test_a_name_that_two_subfolders_have_is_refused_where_a_prompt_needs_it(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / "loras" / folder).mkdir(parents=True)
        shutil.copy(files["a"], tmp_path / "loras" / folder)
    found, tagged = {"lora_dir": str(tmp_path / "loras")}, [f"{PROMPT} <lora:a>"]
    draw(model, tmp_path / "plain", **found)
    with pytest.raises(UsageError, match=r"two adapters are named 'a': .*one/a.safetensors and .*two/a.safetensors"):
        draw(model, tmp_path / "out", prompts=tagged, **found)
    given = [{"path": str(tmp_path / "loras/two/a.safetensors"), "weight": 0.0}]
    assert draw(model, tmp_path / "out", prompts=tagged, loras=given, **found)["generated"] == 1


def test_the_command_line_gives_files_with_weights(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    word = tmp_path / "word.safetensors"
    save_file({"emb_params": torch.ones(2, 24)}, word)
    options = ["--lora", f"{files['a']}=0.5", "--lora", files["b"], "--embedding", f"{word}=<toy>"]
    options += ["--steps", "2", "-n", "1", "--out", str(tmp_path / "out")]
    assert ldm(["sample", "--model", str(model), "-p", PROMPT, *options]) == 0
    content = json.loads((tmp_path / "out/images.json").read_text())
    assert content["images"][0]["loras"] == {"a": 0.5, "b": 1.0}
    assert content["job"]["embedding_sha256"] == {"<toy>": file_sha256(word)}

"""Recipes: every problem at once, each as one exact line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.config import DataConfig
from ldm_cli.errors import InputNotFoundError, RecipeError
from ldm_cli.recipe import other_names
from ldm_cli.recipe.load import load_recipe, load_section
from ldm_cli.recipe.schema import RECIPES, TrainVaeRecipe
from ldm_cli.training.config import TrainConfig

GOOD = """\
command: train-vae
name: tiny
data:
  shards: a.tar
vae: {}
train:
  steps: 10
  batch_size: 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, *overrides: str, **settings: Any) -> list[str]:
    """The problems of a recipe that is wrong, with the folder's name cut off."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, **settings)
    return [line.replace(f"{path}:", "r.yaml:") for line in caught.value.problems]


def test_a_good_recipe_is_loaded_with_its_text_and_every_default(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, GOOD), ["train.lr=1e-3"])
    assert isinstance(loaded.recipe, TrainVaeRecipe)
    assert loaded.recipe.train.lr == 1e-3
    assert loaded.text == GOOD
    assert loaded.recipe.to_mapping()["train"]["lr_schedule"] == "cosine"
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


ZOO = [
    ("train:", "trian:", "r.yaml:6:1: trian: unknown key (did you mean 'train'?)"),
    ("  steps:", "  stpes:", "r.yaml:7:3: train.stpes: unknown key (did you mean 'steps'?)"),
    ("  steps: 10", "  Steps: 10", "r.yaml:7:3: train.Steps: unknown key (did you mean 'steps'?)"),
    ("name: tiny", "name: tiny\nlr: 1e-3", "r.yaml:3:1: lr: unknown key (did you mean 'train.lr'?)"),
    (
        "name: tiny",
        "name: tiny\nzzz: 1",
        "r.yaml:3:1: zzz: unknown key; expected one of command, name, seed, data, train, variant, start_from, freeze, "
        "vae, vq, codebook, loss",
    ),
    ("  steps: 10\n", "", "r.yaml:6:1: train: missing required key 'steps'"),
    ("name: tiny\n", "", "r.yaml:1:1: missing required key 'name'"),
    ("steps: 10", "steps: 010", "r.yaml:7:10: train.steps: expected an integer, found text '010' (write 10)"),
    ("steps: 10", "steps: 1_0", "r.yaml:7:10: train.steps: expected an integer, found text '1_0' (write 10)"),
    ("steps: 10", "steps: 0o10", "r.yaml:7:10: train.steps: expected an integer, found text '0o10'"),
    ("steps: 10", "steps: 12:30:00", "r.yaml:7:10: train.steps: expected an integer, found text '12:30:00'"),
    ("steps: 10", "steps: 2020-01-01", "r.yaml:7:10: train.steps: expected an integer, found text '2020-01-01'"),
    ("steps: 10", "steps: 1e3", "r.yaml:7:10: train.steps: expected an integer, found number 1000.0 (write 1000)"),
    ("steps: 10", "steps: 2.5", "r.yaml:7:10: train.steps: expected an integer, found number 2.5"),
    ("steps: 10", "steps: true", "r.yaml:7:10: train.steps: expected an integer, found true"),
    ("steps: 10", "steps:", "r.yaml:7:9: train.steps: expected an integer, found null"),
    ("steps: 10", "steps: [10]", "r.yaml:7:10: train.steps: expected an integer, found a list of 1"),
    ("steps: 10", "steps: 0", "r.yaml:7:10: train.steps: expected at least 1, found integer 0"),
    (
        "steps: 10",
        "steps: 10\n  lr: '1e-4'",
        "r.yaml:8:7: train.lr: expected a number, found the quoted text '1e-4' (remove the quotes)",
    ),
    ("steps: 10", "steps: 10\n  lr: 0", "r.yaml:8:7: train.lr: expected more than 0, found integer 0"),
    ("steps: 10", "steps: 10\n  lr: no", "r.yaml:8:7: train.lr: expected a number, found text 'no'"),
    (
        "steps: 10",
        "steps: 10\n  ema_warmup: no",
        "r.yaml:8:15: train.ema_warmup: expected true or false, found text 'no' (write false)",
    ),
    (
        "steps: 10",
        "steps: 10\n  ema_warmup: True",
        "r.yaml:8:15: train.ema_warmup: expected true or false, found text 'True' (write true)",
    ),
    (
        "steps: 10",
        "steps: 10\n  lr_schedule: cosin",
        "r.yaml:8:16: train.lr_schedule: found text 'cosin' (did you mean 'cosine'?), expected 'constant' or 'cosine'",
    ),
    ("steps: 10", "steps: 10\n  betas: [0.9]", "r.yaml:8:10: train.betas: expected 2 entries, found 1"),
    (
        "steps: 10",
        "steps: 10\n  betas: [0.9, 0.9, 0.9]",
        "r.yaml:8:10: train.betas: expected at most 2 entries, found a list of 3",
    ),
    ("steps: 10", "steps: 10\n  betas: [0.9, 2]", "r.yaml:8:16: train.betas.1: expected at most 1, found integer 2"),
    (
        "shards: a.tar",
        "shards: 3",
        "r.yaml:4:11: data.shards: expected text or a list, found integer 3 (put it in quotes)",
    ),
    (
        "shards: a.tar",
        "shards: [a.tar, 3]",
        "r.yaml:4:19: data.shards.1: expected text, found integer 3 (put it in quotes)",
    ),
    (
        "shards: a.tar",
        "shards: a.tar\n  caption:",
        'r.yaml:5:11: data.caption: expected text, found null (empty text is "")',
    ),
    ("name: tiny", "name: ../x", "r.yaml:2:7: name: expected text that matches"),
    ("vae: {}", "vae: 3", "r.yaml:5:6: vae: expected a mapping, found integer 3"),
    ("vae: {}", "vae: {in_chanels: 3}", "r.yaml:5:7: vae.in_chanels: unknown key (did you mean 'in_channels'?)"),
    (
        "batch_size: 4",
        "batch_size: 4\n  deterministic: elastic\n  micro_batch: 3",
        "r.yaml:10:16: train.micro_batch: micro_batch=3 does not divide batch_size=4",
    ),
    (
        "command: train-vae",
        "command: train-vea",
        "r.yaml:1:10: command: found text 'train-vea' (did you mean 'train-vae'?), expected one of train-clip, "
        "train-vae, train-unet, train-ar, train-prior, cascade, sample, eval",
    ),
    (
        "command: train-vae\n",
        "",
        "r.yaml:1:1: missing required key 'command'; one of train-clip, train-vae, train-unet, train-ar, train-prior, "
        "cascade, sample, eval",
    ),
    ("name: tiny", "name: tiny\nname: two", "r.yaml:3:1: name: duplicate key, first given at line 2"),
]


@pytest.mark.parametrize(("old", "new", "line"), ZOO)
def test_one_mistake_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert old in GOOD
    found = problems(write(tmp_path, GOOD.replace(old, new, 1)))
    assert len(found) == 1
    assert found[0] == line or (line.endswith("matches") and found[0].startswith(line))


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("tiny", "7").replace("a.tar", "a.tar\n  crop: centre").replace("steps: 10", "stepz: 10")
    assert problems(write(tmp_path, text), "train.batch_size=x") == [
        "r.yaml:2:7: name: expected text, found integer 7 (put it in quotes)",
        "r.yaml:5:9: data.crop: found text 'centre' (did you mean 'center'?), "
        "expected 'center', 'random', 'squash' or 'native'",
        "r.yaml:8:3: train.stepz: unknown key (did you mean 'steps'?)",
        "override 'train.batch_size=x': train.batch_size: expected an integer, found text 'x'",
    ]


def test_a_mistake_hides_no_other_one(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "steps: 10\n  warmup_steps: 40\n  lr: -1\n  epochs: 3")
    text = text.replace("vae: {}", "vae: {block_out_channels: [64, 64], up_block_types: [UpDecoderBlock2D]}")
    text = text.replace("name: tiny\n", "name: tiny\nfreeze: [encoder]\nfreeze: [decoder]\n")
    assert problems(write(tmp_path, text), "data.image_size=31", "train.steps.x=1") == [
        "r.yaml:4:1: freeze: duplicate key, first given at line 3",
        "override 'train.steps.x=1': train.steps.x: expected a mapping to set 'x' in, found integer 10",
        "r.yaml:4:9: freeze: freeze needs start_from: fresh weights would stay random",
        "r.yaml:7:53: vae.up_block_types: up_block_types has 1 entries, block_out_channels has 2",
        "r.yaml:10:17: train.warmup_steps: warmup_steps=40 is more than steps=10",
        "r.yaml:11:7: train.lr: expected more than 0, found integer -1",
        "r.yaml:12:3: train.epochs: unknown key (did you mean 'steps'?)",
        "override 'data.image_size=31': data.image_size=31 is no multiple of the autoencoder's factor 2",
    ]


@pytest.mark.parametrize("name", ["demo/unet", "unet/sd15", "demo/sample", "demo/eval", "lora/sd15", "demo/ar"])
def test_a_section_of_the_wrong_type_is_one_problem_and_what_follows_from_it_is_none(name: str) -> None:
    recipe = load_recipe(name).recipe.to_mapping()
    for section in (key for key, value in recipe.items() if isinstance(value, dict)):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name, [f"{section}=3"])
        assert len(caught.value.problems) == 1, caught.value.problems


@pytest.mark.parametrize(
    "change", ["classes=[a, a]", "classes=3", "classes=[]", "data.label=null", "unet.num_class_embeds=3"]
)
def test_a_mistake_in_classes_does_not_ask_for_a_text_encoder(change: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("unet/cifar10-classes", [change])
    (problem,) = caught.value.problems
    assert problem.startswith(f"override '{change}': {change.partition('=')[0]}")


def test_pixels_without_text_and_classes_are_told_of_both() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("unet/cifar10-classes", ["classes=null", "unet.num_class_embeds=null"])
    assert caught.value.problems[0].endswith("no start_from to take it from, and no classes in place of text_encoder")


SUGGESTIONS = [
    ("sampling.sampler=euler_a", "did you mean 'euler_ancestral'?"),
    ("sampling.sampler=DPM++ 2M Karras", "did you mean 'dpmpp_2m' with timestep_spacing: karras?"),
    ("sampling.sampler=DPMSolverMultistepScheduler", "did you mean 'dpmpp_2m'?"),
    ("sampling.cfg_scale=3", "did you mean 'sampling.guidance.scale'?"),
    ("num_inference_steps=3", "did you mean 'sampling.steps'?"),
]


@pytest.mark.parametrize(("override", "suggestion"), SUGGESTIONS)
def test_the_names_of_other_programs_are_known(override: str, suggestion: str) -> None:
    base = {"command": "sample", "model": "x"}
    (problem,) = problems(None, override, expected_command="sample", base=base)
    assert problem.partition(", expected")[0].endswith(f"({suggestion})"), "before the list of all names"


def test_every_other_name_stands_for_a_field_there_is() -> None:
    for field, names in other_names._FIELDS.items():
        for name in names.split():
            found = {other_names.field_called(name, recipe) for recipe in RECIPES.values()}
            assert any(place and (place == field or place.endswith(f".{field}")) for place in found), name


def test_block_types_follow_from_a_list_of_channels() -> None:
    vae = AutoencoderKLConfig.from_mapping({"block_out_channels": [64, 64, 64]})
    assert vae.down_block_types == ("DownEncoderBlock2D",) * 3
    for levels, down in enumerate(["C", "CD", "CCD", "CCCD"], start=1):
        unet = UNet2DConditionConfig.from_mapping({"block_out_channels": [32] * levels})
        assert [kind[0] for kind in unet.down_block_types] == list(down)
        assert [kind.replace("Up", "Down") for kind in reversed(unet.up_block_types)] == list(unet.down_block_types)


def test_the_union_branch_that_fits_the_data_explains_it(tmp_path: Path) -> None:
    clip = GOOD.replace("train-vae", "train-clip").replace("vae: {}", "clip: {vision_config: {%s}}")
    vit = problems(write(tmp_path, clip % "patch_sice: 4, image_size: 256"))
    assert vit == ["r.yaml:5:24: clip.vision_config.patch_sice: unknown key (did you mean 'patch_size'?)"]
    resnet = problems(write(tmp_path, clip % "model_type: modified_resnet, image_size: 256, widht: 64"))
    assert resnet == ["r.yaml:5:70: clip.vision_config.widht: unknown key (did you mean 'width'?)"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps", "override 'train.steps': expected key=value, such as train.lr=1e-4"),
        ("=3", "override '=3': expected key=value, such as train.lr=1e-4"),
        ("a..b=3", "override 'a..b=3': expected key=value, such as train.lr=1e-4"),
        ("train.stpes=3", "override 'train.stpes=3': train.stpes: unknown key (did you mean 'steps'?)"),
        (
            "train.steps.x=3",
            "override 'train.steps.x=3': train.steps.x: expected a mapping to set 'x' in, found integer 10",
        ),
        ("train.betas.1=3", "override 'train.betas.1=3': train.betas.1: expected an entry 0 to 0, found 1"),
        (
            "train.steps=010",
            "override 'train.steps=010': train.steps: expected an integer, found text '010' (write 10)",
        ),
        (
            "vae={in_channels: x}",
            "override 'vae={in_channels: x}': vae.in_channels: expected an integer, found text 'x'",
        ),
        ("name=" + "x" * 200, "override 'name=" + "x" * 74 + "…': name: expected text that matches"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, problem: str) -> None:
    found = problems(write(tmp_path, GOOD), override)
    assert len(found) == 1
    assert found[0] == problem or (problem.endswith("matches") and found[0].startswith(problem))


def test_an_override_that_is_no_yaml_says_so(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD), "data.shards=*.tar")
    assert found.startswith("override 'data.shards=*.tar': data.shards: not valid YAML")
    assert found.endswith("(text may need quotes)")


def test_overrides_follow_the_yaml_rules_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = [
        "train.lr=1e-4",
        "train.lr=2e-4",
        "data.shards='a=b/{000..127}.tar'",
        "train.betas=[0.5, 0.75]",
        "train.betas.0=0.25",
        "loss.kl_weight=0",
        "name='010'",
        "train.max_grad_norm=",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), overrides).recipe
    assert isinstance(recipe, TrainVaeRecipe)
    assert recipe.train.lr == 2e-4
    assert recipe.data.shards == "a=b/{000..127}.tar"
    assert recipe.train.betas == (0.25, 0.75)
    assert recipe.loss.kl_weight == 0
    assert recipe.name == "010"
    assert recipe.train.max_grad_norm is None


def test_overrides_make_lists_and_mappings_that_are_not_there() -> None:
    overrides = ["data.shards=a", "eval.metrics=[zero_shot]", "eval.clip=c"]
    overrides += [f"eval.zero_shot.{i}.{key}" for i in (0, 1) for key in ("name=n", "label=cls", "classes=[a, b]")]
    recipe = load_recipe(None, overrides, expected_command="eval").recipe
    assert [task.name for task in recipe.eval.zero_shot] == ["n", "n"]  # type: ignore[union-attr]


def test_an_override_that_repairs_the_file_leaves_no_problem(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("steps: 10", "steps: ten"))
    assert load_recipe(path, ["train.steps=10"]).recipe.train.steps == 10  # type: ignore[union-attr]


def test_a_recipe_for_another_command_names_the_command_to_run(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert problems(path, expected_command="train-clip") == [
        f"r.yaml:1:10: command: this is a train-vae recipe; run: ldm train-vae {path}"
    ]


def test_options_are_named_as_options() -> None:
    options = [("--steps", "sampling.steps", 0), ("--model", "model", "x")]
    assert problems(None, expected_command="sample", options=options) == [
        "option '--steps': sampling.steps: expected at least 1, found integer 0"
    ]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"command: x\nname: \xff", "r.yaml:2:7: expected UTF-8 text, found byte 0xff"),
        (b"", "r.yaml:1:1: expected a mapping of keys to values, found null"),
        (b"- a", "r.yaml:1:1: expected a mapping of keys to values, found a list of 1"),
        (b"\xef\xbb\xbfcommand: train-vea", "r.yaml:1:10: command: found text 'train-vea'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    assert problems(path)[0].startswith(problem)


def test_control_characters_of_a_recipe_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD.replace("vae: {}", 'vae: {"a\\e[31m\\u202e": 1}')))
    assert "\x1b" not in found
    assert "\u202e" not in found
    assert "\\x1b[31m\\u202e: unknown key" in found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.yaml", "no such file, and no shipped recipe of that name; see ldm recipe list"),
        ("demo/clop", "did you mean 'demo/clip'?"),
        ("runs/demo-unet", "'runs/demo-unet': is a folder; ldm sample takes a model as --model runs/demo-unet"),
    ],
)
def test_a_recipe_that_is_not_there_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "runs" / "demo-unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputNotFoundError) as caught:
        load_recipe(name)
    assert words in str(caught.value)


def test_a_single_section_is_loaded_by_the_same_rules() -> None:
    section = load_section(TrainConfig, ["steps=5"], [("--batch-size", "batch_size", 2)])
    assert (section.steps, section.batch_size) == (5, 2)
    with pytest.raises(RecipeError) as caught:
        load_section(TrainConfig, ["steps=5"], [])
    assert caught.value.problems == ("the command line: missing required key 'batch_size'",)


def test_a_tilde_in_a_path_of_a_recipe_is_the_home_folder_and_in_a_prompt_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    changes = ["model=~/m", "edit.image=~/a.png", "out=~/out", "prompts=['~/x']", "sampling.negative='~/y'"]
    recipe = load_recipe(None, changes, "sample").recipe.to_mapping()
    assert (recipe["model"], recipe["edit"]["image"], recipe["out"]) == ("/home/me/m", "/home/me/a.png", "/home/me/out")
    assert (recipe["prompts"], recipe["sampling"]["negative"]) == (["~/x"], "~/y")
    data = load_section(DataConfig, ["shards=[~/a.tar, b~/c.tar, ~nobody-here/d.tar]", "val_shards=~/v-*.tar"], [])
    assert data.shards == ("/home/me/a.tar", "b~/c.tar", "~nobody-here/d.tar")
    assert data.val_shards == "/home/me/v-*.tar"


def test_what_looks_like_a_secret_is_not_shown_again() -> None:
    for changes in (["hub.token=hf_abc", "secret=hf_abc"], ["data.api_key='hf_abc", "train.password={hf_abc"]):
        with pytest.raises(RecipeError) as caught:
            load_recipe("demo/clip", changes)
        assert "hf_abc" not in str(caught.value) + "".join(caught.value.problems)
        for change in changes:
            assert f"override '{change.partition('=')[0]}=…'" in "".join(caught.value.problems)


def test_a_misspelt_command_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("comand: train-clip\nname: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "missing required key 'command' (is it 'comand'?)" in caught.value.problems[0]


@pytest.mark.parametrize("field", ["seed", "train.steps", "sampling.seed", "train.batch_size"])
def test_a_number_beyond_64_bits_is_a_problem_of_the_recipe(field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo/sample" if "sampling" in field else "demo/unet", [f"{field}=99999999999999999999999"])
    assert field in caught.value.problems[0]


def test_a_recipe_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(InputNotFoundError, match="cannot read recipe"):
        load_recipe(tmp_path / "fifo.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(RecipeError, match="8 GiB are more than"):
        load_recipe(tmp_path / "large.yaml")

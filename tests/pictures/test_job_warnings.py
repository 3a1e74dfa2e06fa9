"""What a job says of settings and words that do not have the effect they seem to ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm_cli.families.family import Family
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.pictures.job import make_job
from ldm_cli.pictures.job_warnings import foreign_commands, job_warnings
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from tests.sampling.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny_pipeline().family


def warnings(family: Family, sampling: dict[str, Any], edit: dict[str, Any] | None = None, **job: Any) -> list[str]:
    edited = EditConfig.from_mapping(edit or {})
    planned = make_job(["a red circle"], SamplingConfig.from_mapping(sampling), edited, **job)
    return job_warnings(planned.items, family, weighted=True)


@pytest.mark.parametrize(
    ("sampling", "edit", "expected"),
    [
        ({"guidance": 0.0}, None, "sampling.guidance.scale=0 ignores the prompt"),
        ({"guidance": {"scale": 0.0, "perturb": {}}}, None, "sampling.guidance.scale=0 ignores the prompt"),
        ({"guidance": {"scale": 0.0, "clip": {"model": "c", "scale": 0.0}}}, None, "ignores the prompt"),
        ({"steps": 4}, {"image": "x.png", "strength": 0.2}, "edit.strength=0.2 of 4 steps leaves none"),
        ({"steps": 1}, {"image": "x.png"}, "edit.strength=0.8 of 1 steps leaves none"),
        ({}, {"image": "x.png", "strength": 0.0}, "edit.strength=0 of 50 steps leaves none"),
        (
            {"guidance": 1.0, "negative": "green"},
            None,
            "sampling.negative has no effect with sampling.guidance.scale=1",
        ),
        ({"guidance": {"scale": 2.0, "model": "m"}, "negative": "x"}, None, "sampling.negative has no effect"),
        ({"guidance": {"scale": 1.0, "apg": {}}}, None, "sampling.guidance.apg has no effect"),
        ({"guidance": {"scale": 1.0, "rescale": 0.7}}, None, "sampling.guidance.rescale has no effect"),
        ({"guidance": {"scale": 0.0, "model": "m", "rescale": 0.7}}, None, "rescale has no effect with sampling.guid"),
        ({"guidance": {"scale": 0.0, "model": "m", "apg": {}}}, None, "apg has no effect with sampling.guidance.scale"),
        ({"guidance": {"scale": 1.0, "interval": [0.1, 3.0]}}, None, "sampling.guidance.interval has no effect"),
        ({"guidance": {"scale": 1.0, "interval": [0.1, 3.0], "perturb": {"scale": 0.0}}}, None, "interval has no"),
        ({"sampler": "heun", "eta": 0.5}, None, "sampling.eta=0.5 has no effect on heun"),
        ({"sampler": "lcm", "eta": 1.0}, None, "sampling.eta=1 has no effect on lcm"),
        ({"sampler": "unipc", "eta": 0.0}, None, "sampling.eta=0 has no effect on unipc"),
        ({"sizes": {"crop": [4, 0]}}, None, "sampling.sizes has no effect on a model that takes no sizes"),
        ({"negative_sizes": {"crop": [4, 0]}}, None, "sampling.negative_sizes has no effect on a model"),
    ],
)
def test_a_setting_without_effect_is_named_once(
    family: Family, sampling: dict[str, Any], edit: dict[str, Any] | None, expected: str
) -> None:
    (message,) = warnings(family, sampling, edit)
    assert expected in message


@pytest.mark.parametrize(
    ("sampling", "edit"),
    [
        ({}, None),
        ({"guidance": 1.0}, None),
        ({"guidance": 3.0, "negative": "green", "eta": 0.5}, None),
        ({"guidance": {"scale": 0.0, "clip": {"model": "c"}}}, None),
        ({"guidance": {"scale": 0.0, "interval": [0.1, 3.0]}}, None),
        ({"guidance": {"scale": 1.0, "interval": [0.1, 3.0], "perturb": {}}}, None),
        ({"sampler": "dpmpp_sde", "eta": 0.3}, None),
        ({"steps": 5}, {"image": "x.png", "strength": 0.2}),
    ],
)
def test_settings_with_effect_are_not_named(
    family: Family, sampling: dict[str, Any], edit: dict[str, Any] | None
) -> None:
    assert warnings(family, sampling, edit) == []


def test_of_several_values_the_one_without_effect_is_found(family: Family) -> None:
    (message,) = warnings(family, {}, axes=["guidance.scale=3,0,0"])
    assert "guidance.scale=0" in message


@pytest.mark.parametrize("base", [{"scale": 0.0}, {"scale": 1.0}, {"scale": 1.0, "perturb": {}}, {"scale": 3.0}])
@pytest.mark.parametrize("added", [{"interval": [0.5, 5.0]}, {"rescale": 0.7}, {"apg": {}}, {"negative": "green"}])
def test_a_setting_is_named_exactly_where_it_does_not_change_the_picture(
    family: Family, base: dict[str, Any], added: dict[str, Any]
) -> None:
    def picture(settings: dict[str, Any]) -> torch.Tensor:
        sampling = SamplingConfig.from_mapping({"steps": 4, "images_per_prompt": 1} | settings)
        (generated,) = Pipeline(family).generate([ImageRequest("a red circle", 0)], sampling)
        return generated.pixels

    settings = added | {"guidance": base} if "negative" in added else {"guidance": base | added}
    is_unused = torch.equal(picture(settings), picture({"guidance": base}))
    found = [message for message in warnings(family, settings) if "has no effect" in message]
    assert len(found) == is_unused


@pytest.mark.parametrize("prompts", [["a red circle", ""], ["", "a red circle"]])
def test_a_prompt_that_is_ignored_is_found_beside_an_empty_one(family: Family, prompts: list[str]) -> None:
    job = make_job(prompts, SamplingConfig.from_mapping({"guidance": 0.0}), EditConfig())
    (message,) = job_warnings(job.items, family, weighted=True)
    assert "sampling.guidance.scale=0 ignores the prompt" in message


@pytest.mark.parametrize(
    "command",
    [
        "<lora:style_v2:0.8>", "<lyco:x:1>", "<hypernet:anime:0.5>", "BREAK", "AND", "[red|blue]", "[red:blue:8]",
        "[red:0.5]", "[red::4]", "[red]", "(red:-1)", "(red:1,3)", "((red))", "{red|blue}", "{red}",
        "embedding:bad_hands", "__color__", "red::2", "--ar", "--no", "<random:red,blue>", "<LORA:x:1>",
        "<fromto[0.5]:a,b>", "ADDCOMM", "ADDROW", "red++", "::2", "--aspect", "--style", "--chaos", "--niji", "--v",
        "--q", "--s", "--stylize", "Negative prompt:",
    ],
)  # fmt: skip
def test_a_command_of_another_program_is_named(command: str) -> None:
    assert foreign_commands([f"a cat {command} on a mat"], weighted=True) == [command]


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.3) circle (or so)", r"a \(\(red\)\) circle, \[x\]", "a <cat-toy> sks", "CATS AND DOGS",
        "a cat and a dog", "3:4 ratio, 10:30 pm", "well-known -- and old", "C++ logo", "snake_case_name",
        "ADDED VALUE", "at <3 o'clock", "--- or so", "a (cat). 3 dogs",
    ],
)  # fmt: skip
def test_plain_words_and_weights_that_are_read_are_not_named(prompt: str) -> None:
    assert foreign_commands([prompt], weighted=True) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((80, 32), "size 80x32 is far from 32x32, the size of the model's training"),
        ((80, 32), "enlarge smaller ones by --upscale MODEL, or add --tile"),
        ((32, 12), "size 32x12 is far from 32x32.*; leave --size out"),
        ((76, 16), None),
        ((None, 32), None),
        ((None, 80), "size 32x80 is far"),
    ],
)
def test_a_size_far_from_that_of_the_training_is_named(
    family: Family, monkeypatch: pytest.MonkeyPatch, size: tuple[int | None, int | None], words: str | None
) -> None:
    monkeypatch.setattr(type(family), "sample_size", (16, 16))
    messages = warnings(family, {"width": size[0], "height": size[1]})
    assert len(messages) == (words is not None)
    assert words is None or re.search(words, messages[0])


def test_windows_and_upscalers_take_any_size(family: Family) -> None:
    job = make_job(["a red circle"], SamplingConfig(width=160, height=160), EditConfig())
    assert job_warnings(job.items, family, weighted=True, window=16) == []
    upscaler = replace(family, low_resolution=LowResolution(2, 1, 10, 5, {}))
    assert job_warnings(job.items, upscaler, weighted=True) == []


def test_parentheses_are_text_where_weights_are_off() -> None:
    assert foreign_commands(["((red)) (blue:-1) [x]"], weighted=False) == ["[x]"]


def test_a_job_names_commands_of_all_its_prompts_in_one_message(family: Family) -> None:
    sampling = SamplingConfig(negative="<lora:x:1>", images_per_prompt=2)
    job = make_job(["a BREAK b", "c AND d", "{e|f}"], sampling, EditConfig())
    (message,) = job_warnings(job.items, family, weighted=True)
    assert "'BREAK', '<lora:x:1>', 'AND', …: commands of other programs" in message


def test_a_break_is_a_command_that_is_known_where_prompts_may_be_long(family: Family) -> None:
    job = make_job(["a BREAK b"], SamplingConfig(long_prompts=True, negative="c BREAK"), EditConfig())
    assert job_warnings(job.items, family, weighted=True) == []


def test_a_distilled_model_has_no_use_for_what_guides_in_two_calls(family: Family) -> None:
    config = family.denoiser.config.model_copy(update={"time_cond_proj_dim": 8})
    distilled = replace(family, denoiser=type("Distilled", (), {"config": config})())
    found = warnings(distilled, {"guidance": {"scale": 0.0, "interval": [0.1, 3.0]}, "negative": "green"})
    assert len(found) == 2
    assert all("on a model that was distilled with guidance" in message for message in found)

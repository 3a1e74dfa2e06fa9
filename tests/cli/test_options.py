"""How the texts of options are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli import app
from ldm_cli.cli.options import expand_paths, is_setting, seconds, size
from ldm_cli.data.config import DataConfig
from ldm_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("3h", 10800.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("90m", 5400.0),
        ("45s", 45.0),
        ("2d", 172800.0),
        ("30:00", 1800.0),
        ("1:30:00", 5400.0),
        ("1-12:00:00", 129600.0),
        ("3600", 3600.0),
        ("0.5", 0.5),
    ],
)
def test_a_duration_has_many_spellings(text: str | None, expected: float | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0h", "-1h", "3x", "h", "1:2:3:4", "nan", "inf", "1..5h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration"):
        seconds(text)


def test_a_size_is_width_by_height() -> None:
    assert (size("640x480"), size("64X32"), size("512"), size(None)) == ((640, 480), (64, 32), (512, 512), None)
    for text in ("", "x", "64x", "6.4x5", "-1x5", "64x64x64"):
        with pytest.raises(UsageError, match="is no size"):
            size(text)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ldm sample` hands to its stage."""
    from ldm_cli.stages import sample

    seen: dict[str, Any] = {}

    def run(recipe: Any, options: Any, reporter: Any, latents: Any = None, repeated: Any = None) -> dict[str, Any]:
        seen.update(recipe=recipe, options=options, latents=latents, repeated=repeated)
        return {"images": 0}

    monkeypatch.setattr(sample, "run", run)
    return seen


def test_options_of_sample_override_the_recipe(sampled: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_bytes(b"\xef\xbb\xbffirst\r\n\n  second  \nbad \xff\n")
    arguments = ["sample", "demo/sample", "sampling.steps=7", "--steps", "9", "-n", "2", "--seed", "5"]
    arguments += ["--guidance", "2", "--size", "64x32", "--sampler", "euler", "--negative", "blurry"]
    arguments += ["--batch-size", "3", "--eta", "0.5", "--prompts", str(prompts), "-p", "last", "-p", ""]
    arguments += ["--latents", "z.safetensors", "--out", "here", "--precision", "bf16", "--overwrite", "--compile"]
    arguments += ["--device", "cpu", "--long-prompts", "--clip-skip", "2", "prompts=[zeroth]"]
    assert app.run(arguments) == 0
    from ldm_cli.stages.sample import Latents

    recipe, options = sampled["recipe"], sampled["options"]
    prompts_of_entries = [getattr(entry, "prompt", entry) for entry in recipe.prompts]
    assert prompts_of_entries == [
        "zeroth",
        "first",
        "second",
        "bad \N{LATIN SMALL LETTER Y WITH DIAERESIS}",
        "last",
        "",
    ]
    assert recipe.model == "runs/demo-unet/model"
    assert recipe.sampling.guidance.scale == 2.0
    assert recipe.sampling.model_dump(
        exclude={
            *("timestep_spacing", "timesteps", "guidance", "sizes", "negative_sizes"),
            *("temperature", "top_k", "top_p", "image_scale"),
        }
    ) == {
        "sampler": "euler",
        "steps": 9,
        "eta": 0.5,
        "negative": "blurry",
        "long_prompts": True,
        "clip_skip": 2,
        "images_per_prompt": 2,
        "seed": 5,
        "width": 64,
        "height": 32,
        "batch_size": 3,
        "prior": {"steps": 25, "scale": 4.0, "noise_level": 0},
        "precision": "bf16",
        "compile": True,
    }
    assert (options.out, options.device, options.overwrite) == (Path("here"), "cpu", True)
    assert sampled["latents"] == Latents(Path("z.safetensors"))


def test_sample_needs_no_recipe(sampled: dict[str, Any]) -> None:
    assert app.run(["sample", "--model", "m", "-p", "a=b"]) == 0
    assert (sampled["recipe"].model, sampled["recipe"].prompts) == ("m", ("a=b",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upscale-noise", "3"], "--upscale-noise needs --upscale"),
        (["--best-of", "4"], "--best-of needs --clip"),
    ],
)
def test_an_option_that_needs_another_one_says_so(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["sample", "--model", "m", "-p", "a", *options]) == 2
    assert capsys.readouterr().err == f"ldm: error: {said}; see ldm sample --help [E-USAGE]\n"


def test_the_trainers_pass_on_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_cli.stages import train_clip, train_unet, train_vae

    for name, stage in (("clip", train_clip), ("vae", train_vae), ("unet", train_unet)):
        seen: dict[str, Any] = {}

        def run(recipe: Any, options: Any, reporter: Any, seen: dict[str, Any] = seen) -> dict[str, Any]:
            seen.update(recipe=recipe, options=options)
            return {"state": "finished"}

        monkeypatch.setattr(stage, "run", run)
        arguments = [f"train-{name}", f"demo/{name}", "train.steps=300", "--resume", "never", "--max-time", "2m"]
        assert app.run([*arguments, "--out", "o"]) == 0
        assert (seen["recipe"].command, seen["recipe"].train.steps) == (f"train-{name}", 300)
        options = seen["options"]
        assert (options.out, options.resume, options.max_time) == (Path("o"), "never", 120.0)
        assert options.recipe_text.startswith("# The demo's")


@pytest.mark.parametrize(
    ("arguments", "expanded"),
    [
        (["--out=~/run", "x"], ["--out=/home/me/run", "x"]),
        (["--prompts", "~/p.txt", "--latents=~"], ["--prompts", "/home/me/p.txt", "--latents=/home/me"]),
        (["data", "pack", "~/in", "~/out"], ["data", "pack", "/home/me/in", "/home/me/out"]),
        (["-p", "~/a", "--prompt=~/a", "--negative", "~"], ["-p", "~/a", "--prompt=~/a", "--negative", "~"]),
        (["~100 cats", "a~/b", "x=~/y"], ["~100 cats", "a~/b", "x=~/y"]),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path_and_a_character_in_prompts(
    arguments: list[str], expanded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_paths(arguments) == expanded


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data", "check", ""], "check"),
        (["data", "pack", "in", ""], "in"),
        (["data", "index", "x.tar", "--sizes="], "--sizes"),
        (["train-unet", "demo/unet", "--out", ""], "--out"),
        (["sample", "--model=", "-p", "a dog"], "--model"),
        (["sample", "-p", "a dog", "--latents", ""], "--latents"),
        ([""], "ldm"),
    ],
)
def test_an_empty_path_is_refused_and_not_the_current_folder(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    assert f"the argument after '{named}' is empty" in capsys.readouterr().err


def test_an_empty_text_is_a_text() -> None:
    for option in ("-p", "--prompt", "--negative", "--caption-column", "--caption-template", "--prefix"):
        assert expand_paths([option, ""]) == [option, ""]


@pytest.mark.parametrize("change", ["data.shards=''", "data.shards=['']", "data.quarantine=''", "start_from=''"])
def test_an_empty_path_in_a_recipe_is_refused(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train-clip", "demo/clip", change, "--dry-run"]) == 78
    assert f"{change.partition('=')[0]}: expected text, found ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    [
        "https://h/x.tar?sig=a&b=c",
        "s3://bucket/lang=en/{00..03}.tar",
        "lang=en/x-*.tar",
        "lang=en*",
        "data/date=2024-01-01/x.tar",
        "pipe:aws s3 cp --region=eu s3://b/x.tar -",
        "a=b.tar",
    ],
)
def test_an_equals_sign_in_an_address_or_a_path_makes_no_setting(argument: str) -> None:
    assert not is_setting(argument, DataConfig.model_fields)


@pytest.mark.parametrize(
    "argument", ["caption=json:a/b", "remote_schemes=[http]", "filter.min_side=3", "captoin=txt", "val_shards=v/*.tar"]
)
def test_fields_and_slips_in_their_names_are_settings(argument: str) -> None:
    assert is_setting(argument, DataConfig.model_fields)

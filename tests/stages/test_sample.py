"""`ldm sample` from its recipe to files: what repeats, what completes, what is refused."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm_cli.errors import CheckpointError, DataError, InputNotFoundError, OutputError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.pictures.prompt_files import read_prompt_file
from ldm_cli.pictures.provenance import recipe_of, repeatable_provenance
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplerName, SamplingConfig
from ldm_cli.stages import sample
from ldm_cli.stages.sample import run
from ldm_cli.stages.support import options
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.picture_generator import Latents
from tests.conftest import REPOSITORY
from tests.faults.lives import Life
from tests.formats.web_ui import parse_parameters
from tests.sampling.tiny import tiny_pipeline

USUAL_SAMPLERS = ("ddim", "dpmpp_2m_sde")
OTHER_SAMPLERS = [sampler for sampler in get_args(SamplerName) if sampler not in USUAL_SAMPLERS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().family.save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of a picture, a mask and a style."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name in ("image", "style"):
        save_image(folder / f"{name}.png", torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator))
    mask = torch.zeros(3, 16, 16, dtype=torch.uint8)
    mask[:, 2:9, 4:12] = 255
    save_image(folder / "mask.png", mask)
    return {name: str(folder / f"{name}.png") for name in ("image", "mask", "style")}


def draw(model, out, latents=None, record=None, overwrite=False, **fields):
    """Run the stage on a recipe of these fields, `sampling` given on top of quick ones."""
    sampling = {"steps": 3, "images_per_prompt": 1, "guidance": 3.0} | fields.pop("sampling", {})
    content = {"command": "sample", "model": str(model), "prompts": ["a red circle"], "sampling": sampling, **fields}
    reporter = SilentReporter()
    result = run(SampleRecipe.from_mapping(content), RunOptions(out, "cpu", overwrite=overwrite), reporter, latents)
    return result | {"messages": reporter.messages}


def repeat(picture, out, **changes):
    """As `ldm sample --repeat picture`."""
    record = repeatable_provenance(Path(picture))
    loaded = load_recipe(None, (), "sample", [(k, k, v) for k, v in changes.items()], base=recipe_of(record))
    latents = None
    if "latents" in record["sources"]:
        latents = Latents(Path(record["sources"]["latents"]), record["latents_row"])
    reporter = SilentReporter()
    result = run(loaded.recipe, RunOptions(out, "cpu"), reporter, latents, record)
    return result["images"][0]["file"], reporter.messages


@pytest.mark.parametrize("asked", ["auto", True])
def test_a_job_records_whether_its_model_was_compiled(model, tmp_path, monkeypatch, asked):
    loaded = []

    def noted(path, device, precision, *, compiled):
        loaded.append(compiled)
        return open_family(path, device, precision)

    monkeypatch.setattr(sample, "open_family", noted)
    draw(model, tmp_path / "out", sampling={"compile": asked})
    record = read_provenance(next((tmp_path / "out").glob("0*.png")))
    assert [record["sampling"]["compile"]] == loaded == [asked is True]


def test_a_job_is_compiled_by_itself_if_it_is_large(monkeypatch):
    asked = []
    monkeypatch.setattr(options, "should_compile", lambda setting, _, pays_off, __: asked.append(pays_off) or pays_off)
    for num_pictures in (499, 500):
        sampling = options.settled(SamplingConfig(), num_pictures, torch.device("cuda"), print)
        assert (sampling.compile, sampling.precision) == (asked[-1], "bf16")
    assert asked == [False, True]
    assert options.settled(SamplingConfig(), 1, torch.device("cpu"), print).precision == "fp32"


@pytest.mark.parametrize("axis", ["precision=fp32,bf16", "compile=false,true"])
def test_pictures_of_one_job_cannot_differ_in_how_the_model_is_loaded(model, tmp_path, axis):
    with pytest.raises(UsageError, match=f"{axis.split('=')[0]}=.* for some pictures: the model is loaded once"):
        draw(model, tmp_path / "out", xy=[axis])
    assert not (tmp_path / "out").exists()


def pictures_in(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("[0-9]*"))}


def everything_in(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", "images.sha256")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", [*USUAL_SAMPLERS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHER_SAMPLERS)]
)
def test_files_of_every_sampler_are_the_same_for_any_batch_order_and_subset(model, tmp_path, sampler):
    prompts = ["a red circle", "a blue square", ""]
    together = draw(model, tmp_path / "a", prompts=prompts, sampling={"sampler": sampler, "images_per_prompt": 3})
    expected = {(i["prompt"], i["seed"]): Path(i["file"]).read_bytes() for i in together["images"]}
    assert len(set(expected.values())) == 9
    for number, (chosen, batch_size) in enumerate([(prompts[::-1], 1), (prompts[1:], 3), (prompts[:1], 8)]):
        fields = {"sampler": sampler, "images_per_prompt": 3 - number, "batch_size": batch_size}
        for image in draw(model, tmp_path / f"{number}", prompts=chosen, sampling=fields)["images"]:
            assert Path(image["file"]).read_bytes() == expected[image["prompt"], image["seed"]]


def various(pictures, tmp_path):
    """Twenty jobs that have little in common; the third picture of each is repeated."""
    image, mask, style = (pictures[name] for name in ("image", "mask", "style"))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    save_file({"latents": noise}, tmp_path / "latents.safetensors")
    guided = {"scale": 4.0, "rescale": 0.7, "interval": [0.1, 5.0]}
    return [
        *({"sampling": {"sampler": s, "seed": 40}} for s in ("ddpm", "euler_ancestral", "heun", "dpmpp_sde", "unipc")),
        {"sampling": {"sampler": "ddim", "eta": 0.7, "negative": "(green:0.5), é"}, "weighted_words": False},
        {"sampling": {"guidance": guided, "timestep_spacing": "karras", "sampler": "euler"}},
        {
            "sampling": {"guidance": {"scale": 5.0, "apg": {}}, "clip_skip": 2, "long_prompts": True},
            "prompts": ["red BREAK blue"],
        },
        {"sampling": {"guidance": 1.0, "precision": "bf16", "width": 24, "height": 16}},
        {"edit": {"image": image, "strength": 0.5}},
        {"edit": {"image": image, "mask": mask}, "sampling": {"sampler": "dpmpp_2m_sde"}},
        {"edit": {"image": image, "mask": mask, "strength": 0.7, "extend": [3, 0, 5, 1]}},
        {"edit": {"image": image, "style": style, "style_strength": 0.6, "strength": 0.6}},
        {"edit": {"image": image}, "sampling": {"width": 24, "height": 24}},
        {"variation": 0.3, "sampling": {"sampler": "euler_ancestral"}},
        {"interpolate": 3, "prompts": ["a red circle", "a blue square"]},
        {"xy": ["steps=2,3", "guidance.scale=1,5"]},
        {"prompts": ["a (red:1.4) circle", {"prompt": "x", "sampling": {"steps": 2, "seed": 9}}]},
        {"tile": 16, "sampling": {"width": 32, "height": 24, "images_per_prompt": 3}},
        {"latents": Latents(tmp_path / "latents.safetensors")},
    ]


@pytest.mark.exhaustive
def test_a_picture_of_any_kind_is_repeated_from_itself_alone(model, pictures, tmp_path, monkeypatch):
    jobs = various(pictures, tmp_path)
    assert len(jobs) == 20
    for number, job in enumerate(jobs):
        own = {"images_per_prompt": 4} | job.get("sampling", {})
        drawn = draw(model, tmp_path / f"{number}", **(job | {"sampling": own}))["images"]
        chosen = drawn[2]["file"]
        again, messages = repeat(chosen, tmp_path / f"again-{number}")
        assert messages == [], job
        assert Path(again).read_bytes() == Path(chosen).read_bytes(), job


def test_a_guided_picture_is_repeated_from_anywhere_with_the_same_guide_only(model, tmp_path, monkeypatch):
    weaker = tiny_pipeline()
    torch.nn.init.ones_(weaker.family.denoiser.conv_out.bias)
    weaker.family.save(tmp_path / "weaker")
    monkeypatch.chdir(tmp_path)
    guided = {"guidance": {"scale": 3.0, "model": "weaker"}}
    drawn = tmp_path / draw(model, Path("a"), sampling=guided)["images"][0]["file"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(repeat(drawn, Path("b"))[0]).read_bytes() == drawn.read_bytes()
    torch.nn.init.zeros_(weaker.family.denoiser.conv_out.bias)
    weaker.family.save(tmp_path / "weaker")
    with pytest.raises(CheckpointError, match=r"weights of guidance\.model have changed"):
        repeat(drawn, Path("c"))


def test_a_repeated_picture_needs_what_it_was_drawn_with(model, pictures, tmp_path):
    source = tmp_path / "image.png"
    source.write_bytes(Path(pictures["image"]).read_bytes())
    drawn = draw(model, tmp_path / "a", edit={"image": str(source), "strength": 0.4})["images"][0]["file"]
    assert torch.equal(read_image(repeat(drawn, tmp_path / "b")[0]), read_image(drawn))
    changed, _ = repeat(drawn, tmp_path / "c", **{"sampling.steps": 6})
    assert not torch.equal(read_image(changed), read_image(drawn)), "options change what is repeated"
    source.write_bytes(Path(pictures["style"]).read_bytes())
    with pytest.raises(DataError, match="the image it was made of has changed"):
        repeat(drawn, tmp_path / "d")
    other = tmp_path / "other"
    pipeline = tiny_pipeline()
    torch.nn.init.ones_(pipeline.family.denoiser.conv_out.bias)
    pipeline.family.save(other)
    with pytest.raises(CheckpointError, match="the model's weights have changed"):
        repeat(draw(model, tmp_path / "e")["images"][0]["file"], tmp_path / "f", model=str(other))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\na cat --w 33\n", r"p\.txt:2: prompt 'a cat': width 33 is not possible: not a multiple of"),
        ("p.txt", "a\na <lora:nope> cat\n", r"p\.txt:2: prompt 'a <lora:nope> cat': no adapters are named 'nope'"),
        ("p.txt", "a\na __nope__ cat\n", r"p\.txt:2: prompt 'a __nope__ cat': '.*nope\.txt' not found"),
        ("p.json", '["a", {"prompt": "b", "height": 33}]', r"p\.json' entry 2: prompt 'b': height 33 is not possible"),
    ],
)
def test_what_the_model_or_its_files_cannot_do_is_named_with_the_line_of_the_prompt(
    model, tmp_path, name, text, message
):
    (tmp_path / name).write_text(text)
    content = {"command": "sample", "model": str(model), "prompts": ["x"], "wildcards": str(tmp_path)}
    prompts = tuple(read_prompt_file(tmp_path / name, print))
    recipe = SampleRecipe.from_mapping(content).model_copy(update={"prompts": prompts})
    with pytest.raises((UsageError, InputNotFoundError), match=message):
        run(recipe, RunOptions(tmp_path / "out", "cpu"), SilentReporter())


def test_a_picture_holds_names_and_hashes_and_no_path(model, pictures, tmp_path):
    tiny_pipeline().family.save(tmp_path / "weaker")
    guided = {"guidance": {"scale": 3.0, "model": str(tmp_path / "weaker")}}
    job = {"edit": {"image": pictures["image"], "strength": 0.4}, "sampling": guided}
    drawn = Path(draw(model, tmp_path / "a", **job)["images"][0]["file"])
    assert str(tmp_path).encode() not in drawn.read_bytes()
    record = read_provenance(drawn)
    assert record["sources"] == {"model": model.name, "image": Path(pictures["image"]).name}
    assert record["sampling"]["guidance"]["model"] == "weaker/unet"
    assert len(record["weights"]["unet"]) == 64
    assert repeatable_provenance(drawn)["sources"]["model"] == str(model)
    alone = tmp_path / "sent" / drawn.name
    alone.parent.mkdir()
    alone.write_bytes(drawn.read_bytes())
    assert repeatable_provenance(alone) == record


def test_a_picture_without_its_model_is_repeated_with_the_model_that_is_given(model, tmp_path, monkeypatch):
    alone = tmp_path / "alone.png"
    alone.write_bytes(Path(draw(model, tmp_path / "a")["images"][0]["file"]).read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputNotFoundError, match=f"model '{model.name}' not found; .* add --model DIR"):
        repeat(alone, tmp_path / "b")
    assert torch.equal(read_image(repeat(alone, tmp_path / "b", model=str(model))[0]), read_image(alone))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_every_format_can_be_repeated_and_be_without_metadata(model, tmp_path, suffix):
    drawn = draw(model, tmp_path / "a", format=suffix)["images"][0]["file"]
    assert drawn.endswith(suffix)
    again, _ = repeat(drawn, tmp_path / "b", format=suffix)
    assert Path(again).read_bytes() == Path(drawn).read_bytes()
    bare = draw(model, tmp_path / "c", format=suffix, metadata=False)["images"][0]["file"]
    assert torch.equal(read_image(bare), read_image(drawn))
    with pytest.raises(DataError, match="does not say"):
        read_provenance(bare)
    with Image.open(bare) as image:
        assert not image.getexif()
        assert not getattr(image, "text", {})


def test_the_text_for_web_uis_names_what_they_know(model, pictures, tmp_path):
    fields = {"sampling": {"sampler": "dpmpp_2m", "timestep_spacing": "karras", "negative": "a, b", "seed": 7}}
    fields["sampling"]["clip_skip"] = 2
    drawn = draw(model, tmp_path, edit={"image": pictures["image"], "strength": 0.5}, **fields)["images"][0]["file"]
    with Image.open(drawn) as image:
        found = parse_parameters(image.text["parameters"])
    assert found.pop("Model hash") == read_provenance(drawn)["weights"]["unet"][:10]
    assert found.pop("Version").startswith("ldm_cli ")
    assert found.pop("Model") == model.name
    assert found == {
        "Prompt": "a red circle",
        "Negative prompt": "a, b",
        "Steps": "3",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "3.0",
        "Seed": "7",
        "Size": "16x16",
        "Clip skip": "2",
        "Denoising strength": "0.5",
    }


def test_hostile_prompts_are_kept_verbatim_under_safe_names(model, tmp_path):
    prompts = ["../../etc/passwd", "\x1b[31m\x00\n", "x" * 10_000, "\u202eevil", "a/b\\c:*?", "😀" * 50, "-rf"]
    result = draw(model, tmp_path, prompts=prompts)
    for image, prompt in zip(result["images"], prompts, strict=True):
        name = image["file"].rsplit("/", 1)[1]
        assert name.isascii()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
        assert len(name) <= 64
        assert read_provenance(tmp_path / name)["prompt"] == prompt
    assert any("'xxxx" in message and "was cut" in message for message in result["messages"])
    assert all(len(message) < 600 for message in result["messages"])
    names = [image["file"] for image in result["images"]]
    assert names == sorted(names)


def test_grids_have_a_picture_for_each_pair_of_values(model, tmp_path):
    result = draw(model, tmp_path, xy=["steps=1,2,3", "guidance.scale=1,5"], prompts=["a red circle"])
    assert len(result["images"]) == 6
    steps = [
        (s["steps"], s["guidance"]["scale"]) for s in (read_provenance(i["file"])["sampling"] for i in result["images"])
    ]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (1, 5.0), (2, 5.0), (3, 5.0)]
    grid = read_image(tmp_path / "grid.png")
    for i, image in enumerate(result["images"]):
        pixels = read_image(image["file"])
        left, top = grid.shape[2] - (3 - i % 3) * 132 + 4, grid.shape[1] - (2 - i // 3) * 132 + 4
        assert torch.equal(grid[:, top : top + 128 : 8, left : left + 128 : 8], pixels), i
    alone = draw(model, tmp_path / "one", sampling={"steps": 2, "guidance": 5.0})["images"][0]["file"]
    assert Path(result["images"][4]["file"]).read_bytes() == Path(alone).read_bytes()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["stpes=1,2"], "no field 'stpes'"),
        (["steps"], "not understood"),
        (["steps=1,,2"], "not understood"),
        (["steps=0"], "steps: input should be greater"),
        (["steps=1,2", "steps=3"], "two different fields"),
        (["sampler=ddim,magic"], "sampler"),
        (["edit.strength=0,1"], "cannot be: strength without an image"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_is_written(model, tmp_path, axes, message):
    with pytest.raises(UsageError, match=message):
        draw(model, tmp_path / "out", xy=axes)
    assert not (tmp_path / "out").exists()


def test_a_walk_gives_a_strip_and_an_animation(model, tmp_path):
    fields = {"interpolate": 4, "prompts": ["a red circle", "a blue square"], "sampling": {"images_per_prompt": 2}}
    result = draw(model, tmp_path, **fields)
    assert len(result["images"]) == 10
    assert read_image(tmp_path / "grid.png").shape == (3, 2 * 128 + 12, 5 * 128 + 4 * 4)
    for path, first in zip(result["animations"], (0, 5), strict=True):
        with Image.open(path) as animation:
            assert animation.n_frames == 5
            animation.seek(4)
            last = animation.convert("RGB").tobytes()
        assert last == Image.open(result["images"][first + 4]["file"]).tobytes()
    ends = draw(model, tmp_path / "ends", prompts=["a blue square"], sampling={"seed": 2, "images_per_prompt": 2})
    for walk, image in zip((4, 9), ends["images"], strict=True):
        assert torch.equal(read_image(result["images"][walk]["file"]), read_image(image["file"]))
    with pytest.raises(UsageError, match="one prompt is no walk"):
        draw(model, tmp_path / "x", interpolate=3)


def test_animations_of_an_earlier_job_are_deleted_with_its_pictures(model, tmp_path):
    draw(model, tmp_path, interpolate=2, prompts=["a red circle", "a blue square"])
    assert (tmp_path / "walk-0.webp").exists()
    (tmp_path / "walk-home.webp").write_text("not ours")
    draw(model, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.glob("*.webp")] == ["walk-home.webp"]


def test_a_prompt_has_settings_of_its_own(model, tmp_path):
    entry = {"prompt": "a blue square", "sampling": {"steps": 2, "negative": "red", "seed": 11, "guidance.scale": 2}}
    result = draw(model, tmp_path / "a", prompts=["a red circle", entry])
    own = {"steps": 2, "negative": "red", "seed": 11, "guidance": 2.0}
    alone = draw(model, tmp_path / "b", prompts=["a blue square"], sampling=own)
    assert Path(result["images"][1]["file"]).read_bytes() == Path(alone["images"][0]["file"]).read_bytes()
    with pytest.raises(UsageError, match="'a blue square': there is no field 'stps'"):
        draw(model, tmp_path / "c", prompts=[{"prompt": "a blue square", "sampling": {"stps": 2}}])


def test_a_folder_in_use_is_left_alone(model, tmp_path):
    draw(model, tmp_path)
    before = everything_in(tmp_path)
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        try:
            with pytest.raises(OutputError, match="is in use"):
                draw(model, tmp_path, overwrite=True)
        finally:
            owner.communicate(b"\n")
    assert everything_in(tmp_path) == before
    assert draw(model, tmp_path)["generated"] == 0


def test_what_a_killed_process_left_half_written_is_cleared_away(model, tmp_path):
    drawn = draw(model, tmp_path)
    before = everything_in(tmp_path)
    (tmp_path / ".tmp-00000-a-red-circle-0.png").write_bytes(b"half")
    Path(drawn["images"][0]["file"]).unlink()
    draw(model, tmp_path)
    assert everything_in(tmp_path) == before


def started(model, out):
    """A job of twenty prompts in a process of its own."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle {i}" for i in range(20)))
    arguments = ["sample", "--model", str(model), "--prompts", str(prompts), "-n", "1", "--steps", "5"]
    arguments += ["--sampler", "euler_ancestral", "--device", "cpu", "--out", str(out)]
    return Life(arguments, out.with_suffix(".log"))


def check_interruptions(model, folder, times, generator):
    """Ctrl-C at shares of the processor time of a job, or (None) as its first picture appears; then the same again.

    Returns:
        How often only a part of the pictures was left.
    """
    job = started(model, folder / "whole")
    assert job.end() == 0, job.errors
    whole, pictures = everything_in(folder / "whole"), pictures_in(folder / "whole")
    assert len(pictures) == 20
    partial = 0
    for number, share in enumerate(times):
        out = folder / f"cut-{number}"
        life = started(model, out)
        if share is None:
            while not pictures_in(out) and life.lasts(0.001):
                pass
        else:
            life.computes(share * job.took, generator)
        life.send(signal.SIGINT, group=False)
        assert life.end() in (0, 75, 130), life.errors
        left = pictures_in(out)
        assert left.items() <= pictures.items(), "only whole pictures, and those of the whole job"
        partial += 0 < len(left) < 20
        again = started(model, out)
        assert again.end() == 0, again.errors
        assert everything_in(out) == whole
    return partial


def test_ctrl_c_leaves_whole_pictures_and_the_same_command_completes_them(model, tmp_path):
    generator = random.Random(3)
    assert check_interruptions(model, tmp_path, [0.1, generator.uniform(0.4, 0.9), None], generator) >= 1


@pytest.mark.exhaustive
def test_ctrl_c_at_random_times_always_completes_to_the_same_bytes(model, tmp_path):
    generator = random.Random()
    times = [*(generator.random() for _ in range(4)), None]
    assert check_interruptions(model, tmp_path, times, generator) >= 1


@pytest.mark.slow
def test_two_processes_draw_the_same_files_as_one(model, tmp_path):
    one = draw(model, tmp_path / "one", prompts=["a", "b", "c"], sampling={"images_per_prompt": 3, "sampler": "ddpm"})
    arguments = ["sample", "--model", str(model), "-p", "a", "-p", "b", "-p", "c", "-n", "3", "--steps", "3"]
    arguments += ["--guidance", "3", "--sampler", "ddpm", "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "ldm_cli", *arguments, "--nproc", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["generated"] == one["generated"] == 9
    assert everything_in(tmp_path / "two") == everything_in(tmp_path / "one")

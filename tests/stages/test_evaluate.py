"""`ldm eval` on tiny random models and drawn scenes: every metric, its provenance, and what cannot be
measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.cli.app import run as run_program
from ldm_cli.core.models.dinov2 import Dinov2Model
from ldm_cli.core.models.dinov2_config import Dinov2Config
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.scenes import scene, write_scenes
from ldm_cli.errors import DataError, DivergedError, OutputError, RecipeError, UsageError
from ldm_cli.evaluation.config import PICTURE_METRICS
from ldm_cli.evaluation.perceptual_distance import PerceptualDistance
from ldm_cli.families.codec_folder import open_codec
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.save_model import save_model
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages import compare
from ldm_cli.stages.compare import CompareOptions
from ldm_cli.stages.evaluate import run
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.storage import sealed
from tests.evaluation.inception_weights import inception_weights
from tests.evaluation.lpips_weights import lpips_weights

from ..training.forked import ForkedRanks
from .tiny_eval import recipe, write_home

ALL = ["clip_score", "zero_shot", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scenes`, `clip`, `vae` and `pipeline`."""
    return write_home(tmp_path_factory.mktemp("eval"))


def evaluate(home: Path, metrics: list[str], **changes: Any) -> dict[str, Any]:
    return run(recipe(home, metrics, **changes), RunOptions(device="cpu"), SilentReporter())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_several_ranks_measure_what_one_measures(home: Path, tmp_path: Path, world_size: int) -> None:
    asked = recipe(home, ALL, batch_size=3)
    run(asked, RunOptions(device="cpu", out=tmp_path / "one.json"), SilentReporter())
    options = RunOptions(device="cpu", out=tmp_path / "several.json")
    with ForkedRanks(lambda rank: 0 * len(run(asked, options, SilentReporter())), tmp_path, world_size) as job:
        assert job.wait() == [0] * world_size, job.words()
    one, several = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "several"))
    assert several["metrics"] == one["metrics"]


def test_every_metric_is_measured_and_carries_its_provenance(home: Path, tmp_path: Path) -> None:
    asked = recipe(home, ALL)
    result = run(asked, RunOptions(device="cpu", out=tmp_path / "out"), SilentReporter())
    metrics, provenance = result["metrics"], result["provenance"]
    assert list(metrics) == ALL
    for name in ("real", "generated"):
        score = metrics["clip_score"][name]
        assert -1 <= score["mean_cosine"] <= 1
        assert score["clip_score"] == pytest.approx(40 * score["clipscore_hessel"])
    assert (metrics["clip_score"]["real"]["num_samples"], metrics["clip_score"]["generated"]["num_samples"]) == (20, 6)
    num_single = sum(scene(0, i, "val", 32).truth["num_objects"] == 1 for i in range(20))
    assert metrics["zero_shot"]["color"]["num_samples"] == num_single
    assert metrics["zero_shot"]["held out"]["num_samples"] == 20
    assert 0 <= metrics["retrieval"]["text_to_image@1"] <= metrics["retrieval"]["text_to_image@10"] <= 1
    assert 0 < metrics["reconstruction"]["psnr"] < 30
    digest = weights_sha256(home / "clip")
    assert metrics["frechet_distance"][f"fd[{digest[:8]}]"] > 0
    assert metrics["attribute_accuracy"]["detector"]["all"]["shape"] == 1
    assert metrics["attribute_accuracy"]["generated"]["all"]["num_images"] == 6
    groups = metrics["attribute_accuracy"]["generated"]
    assert (groups["seen"]["num_images"], groups["held_out"]["num_images"]) == (6, 0)
    assert provenance["models"]["clip"]["sha256"] == digest
    assert set(provenance["models"]["pipeline"]["sha256"]) == {"unet", "vae", "text_encoder"}
    assert provenance["models"]["pipeline"]["compile"] is False
    assert provenance["data"]["shards"] == ["val-000000.tar", "val-000001.tar", "val-000002.tar"]
    assert (provenance["data"]["num_samples"], provenance["data"]["num_generated"]) == (20, 6)
    assert EvalRecipe.from_mapping(provenance["recipe"]) == asked
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == sealed(json.loads(json.dumps(result)))


def test_a_linear_probe_is_fitted_to_other_shards(home: Path) -> None:
    probe = {"probe_shards": str(home / "scenes" / "val-00000[12].tar"), "num_probe_samples": 12}
    shards = {"shards": str(home / "scenes" / "val-000000.tar"), "image_size": 32}
    result = run(recipe(home, ["linear_probe"], shards, **probe), RunOptions(device="cpu"), SilentReporter())
    found = result["metrics"]["linear_probe"]["held out"]
    assert (found["num_train"], found["num_samples"], found["num_classes"]) == (12, 10, 3)
    assert 0 <= found["top1"] <= 1
    single = [i for i in range(10, 22) if scene(0, i, "val", 32).truth["num_objects"] == 1]
    assert result["metrics"]["linear_probe"]["color"]["num_train"] == len(single)
    assert result["provenance"]["probe_shards"]["shards"] == ["val-000001.tar", "val-000002.tar"]
    known = recipe(home, ["linear_probe"], shards, **{**probe, "probe_shards": shards["shards"]})
    again = run(known, RunOptions(device="cpu"), SilentReporter())["metrics"]["linear_probe"]["held out"]
    assert again["top1"] >= found["top1"], "samples that it was fitted to are named at least as well"
    with pytest.raises(ValidationError, match=r"linear_probe needs eval.probe_shards"):
        recipe(home, ["linear_probe"])


def test_numbers_depend_neither_on_the_batch_size_nor_on_the_run(home: Path) -> None:
    first, second = (evaluate(home, ALL, batch_size=size)["metrics"] for size in (7, 20))

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return numbers(list(value.values()))
        if isinstance(value, list):
            return [number for inner in value for number in numbers(inner)]
        return [] if value is None else [value]

    assert numbers(first) == pytest.approx(numbers(second), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("small_inception")
def test_metrics_of_pictures_are_those_of_the_kept_pictures(home: Path, tmp_path: Path) -> None:
    weights = tmp_path / "inception.safetensors"
    save_file(inception_weights(), weights)
    model = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    save_model(tmp_path / "dinov2", model.state_dict(), model.config.to_hugging_face())
    given = {"inception": str(weights), "dinov2": str(tmp_path / "dinov2"), "preprocessing": "clean"}
    asked = recipe(home, [*PICTURE_METRICS], **given, num_generated=10, keep_pictures=True)
    result = run(asked, RunOptions(device="cpu", out=tmp_path / "out"), SilentReporter())
    kept = tmp_path / "out" / "eval-pictures" / "000-pipeline"
    for file, picture in zip(sorted(kept.glob("*.png")), _generated(home, 10), strict=True):
        assert torch.equal(read_image(file), picture)
    for number, picture in enumerate(_real(home, 20)):
        save_image(tmp_path / "real" / f"{number:02d}.png", picture)
    options = CompareOptions(PICTURE_METRICS, weights, home / "clip", tmp_path / "dinov2", "clean", device="cpu")
    expected = compare.run(str(kept), str(tmp_path / "real"), options, SilentReporter())
    provenance = expected.pop("provenance")
    found = {name: value for values in result["metrics"].values() for name, value in values.items()}
    assert (found.pop("num_real"), found.pop("num_generated")) == (20, 10)
    assert found.keys() == expected.keys()
    numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    for network in ("inception", "dinov2"):
        assert result["provenance"]["models"][network] == provenance["networks"][network]


def test_a_kept_picture_is_repeated_by_sample(home: Path, tmp_path: Path) -> None:
    asked = recipe(home, ["attribute_accuracy"], keep_pictures=True, sweep={"steps": [1, 2]})
    run(asked, RunOptions(device="cpu", out=tmp_path / "out"), SilentReporter())
    picture = sorted((tmp_path / "out" / "eval-pictures" / "001-pipeline").glob("00003-*.png"))[0]
    assert run_program(["sample", "--repeat", str(picture), "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    again = next((tmp_path / "again").glob("00000-*.png"))
    assert torch.equal(read_image(again), read_image(picture))
    with pytest.raises(UsageError, match="keep_pictures"):
        run(asked, RunOptions(device="cpu"), SilentReporter())


def _real(home: Path, count: int) -> Iterator[Tensor]:
    data = recipe(home, ["reconstruction"]).data
    for batch in sequential_batches(open_shards(data.shards, data, SilentReporter()), data, count, count):
        yield from batch.images


def _generated(home: Path, count: int) -> Iterator[Tensor]:
    requests = [ImageRequest(scene(0, i, "val", 32).caption, i) for i in range(count)]
    sampling = recipe(home, ["clip_score"]).eval.sampling
    pipeline = Pipeline(open_family(home / "pipeline"))
    return (picture.pixels for picture in pipeline.generate(requests, sampling, reporter=SilentReporter()))


def test_each_point_of_a_sweep_is_what_is_measured_alone(home: Path) -> None:
    metrics = ["clip_score", "frechet_distance", "attribute_accuracy"]
    folders = {"a": str(home / "pipeline"), "b": str(home / "pipeline")}
    sweep = {"guidance.scale": [1.0, 3.0], "steps": [1, 2]}
    swept = evaluate(home, metrics, pipeline=None, pipelines=folders, sweep=sweep)
    settings = [{"guidance.scale": scale, "steps": steps} for scale in (1.0, 3.0) for steps in (1, 2)]
    assert [(one["pipeline"], one["settings"]) for one in swept["points"]] == [
        (name, values) for name in "ab" for values in settings
    ]
    alone = evaluate(home, metrics, sampling={"steps": 1, "guidance": 3.0})["metrics"]
    found = swept["points"][6]["metrics"]
    assert found["frechet_distance"] == alone["frechet_distance"] != swept["points"][7]["metrics"]["frechet_distance"]
    for name in ("clip_score", "attribute_accuracy"):
        assert {**swept["metrics"][name], **found[name]} == alone[name]
    assert set(swept["provenance"]["models"]["pipelines"]["b"]["sha256"]) == {"unet", "vae", "text_encoder"}


def test_a_sweep_leaves_a_curve_and_a_table_of_its_points(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {"guidance.scale": [1.0, 2.5], "steps": [1, 2]}
    asked = recipe(home, ["clip_score", "frechet_distance"], sweep=sweep).to_mapping()
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    out = tmp_path / "out"
    assert run_program(["eval", str(tmp_path / "recipe.json"), "--out", str(out), "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = next(row for row in rows if row[:1] == ["pipeline"])
    assert head[:2] == ["pipeline", "guidance.scale"]
    assert sum(row[:1] == ["pipeline"] for row in rows) == 1 + 4
    assert sorted(path.name for path in out.iterdir()) == ["eval-curve.png", "eval-curve.svg", "eval.json"]
    vector = (out / "eval-curve.svg").read_text()
    assert all(f">{text}</text>" in vector for text in ("pipeline, steps 1", "pipeline, steps 2", "2.5"))


def test_the_home_folder_is_known_among_several_pipelines(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    asked = recipe(home, ["attribute_accuracy"], pipeline=None, pipelines={"a": "~/pipeline"})
    assert asked.eval.pipelines == {"a": str(home / "pipeline")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"guidance.size": [1]}}, "eval.sweep: there is no field 'guidance.size'"),
        ({"sweep": {"steps": [5, 0]}}, "eval.sweep cannot be: steps"),
        ({"sweep": {"precision": ["fp32"]}}, "eval.sweep has no precision"),
        ({"sweep": {"steps": [1]}, "pipeline": None}, "eval.sweep needs eval.pipeline"),
        ({"pipelines": {"other": "x"}}, "exclude each other"),
        ({"pipelines": {"no/name": "x"}, "pipeline": None}, "should match pattern"),
    ],
)
def test_a_sweep_that_cannot_be_is_a_recipe_error(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(home, ["retrieval"], **changes)


@pytest.mark.usefixtures("small_inception")
def test_reconstructions_are_measured_by_lpips_and_rfid(home: Path, tmp_path: Path) -> None:
    inception, lpips = tmp_path / "inception.safetensors", tmp_path / "lpips.safetensors"
    save_file(inception_weights(), inception)
    classifier, heads = lpips_weights("alex")
    save_file({**classifier, **heads}, lpips)
    asked = recipe(home, ["reconstruction", "lpips", "rfid"], inception=str(inception), lpips=str(lpips))
    result = run(asked, RunOptions(device="cpu"), SilentReporter())
    images, vae = torch.stack(list(_real(home, 20))), open_codec(home / "vae")
    with torch.inference_mode():
        again = to_bytes(vae.decode(vae.encode(to_signed(images, torch.device("cpu")))))
    expected = PerceptualDistance(lpips, torch.device("cpu"))(again, images)
    assert result["metrics"]["lpips"]["lpips"] == pytest.approx(float(expected.mean()), rel=1e-4)
    for name, pictures in (("again", again), ("real", images)):
        for number, picture in enumerate(pictures):
            save_image(tmp_path / name / f"{number:02d}.png", picture)
    options = CompareOptions(("fid",), inception, device="cpu")
    fid = compare.run(str(tmp_path / "again"), str(tmp_path / "real"), options, SilentReporter())["fid"]
    assert result["metrics"]["rfid"] == {"rfid": pytest.approx(fid, rel=1e-4), "num_samples": 20}


def test_a_metric_without_weights_says_where_they_come_from(home: Path) -> None:
    with pytest.raises(ValidationError, match=r"fid needs eval.inception: take .*; or measure frechet_distance"):
        recipe(home, ["fid"])
    with pytest.raises(ValidationError, match=r"lpips needs eval.lpips: take torchvision's file"):
        recipe(home, ["lpips"])


def test_models_that_no_metric_needs_are_not_loaded(home: Path) -> None:
    result = evaluate(home, ["reconstruction"], clip="nowhere", pipeline="nowhere")
    assert list(result["metrics"]) == ["reconstruction"]
    assert list(result["provenance"]["models"]) == ["vae"]


def test_clip_score_without_a_pipeline_is_that_of_the_real_pairs(home: Path) -> None:
    assert list(evaluate(home, ["clip_score"], pipeline=None)["metrics"]["clip_score"]) == ["real"]


def test_maroon_is_told_from_red_where_the_recipe_asks_for_it(home: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 1, 32, 0, SilentReporter(), val_samples=4, two_object_fraction=0.0, only="color=maroon")
    data = {"shards": str(tmp_path / "val-*.tar")}
    read = [evaluate(home, ["attribute_accuracy"], data=data, new_colors=asked)["metrics"] for asked in (False, True)]
    assert [found["attribute_accuracy"]["detector"]["all"]["color"] for found in read] == [0, 1]


def test_the_ith_caption_is_drawn_with_the_ith_seed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    generate = Pipeline.generate

    def watched(self: Pipeline, requests: Any, *args: Any, **options: Any) -> Any:
        seen.extend((request.prompt, request.seed) for request in requests)
        return generate(self, requests, *args, **options)

    monkeypatch.setattr(Pipeline, "generate", watched)
    monkeypatch.setattr("ldm_cli.stages.support.eval_samples._PICTURES_PER_ROUND", 4)
    found = evaluate(home, ["attribute_accuracy"], sampling={"steps": 1, "seed": 40})["metrics"]
    assert seen == [(scene(0, i, "val", 32).caption, 40 + i) for i in range(6)]
    assert found["attribute_accuracy"]["generated"]["all"]["num_images"] == 6


def test_an_autoencoder_that_returns_its_input_is_perfect(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_cli.stages.support.eval_samples._reconstructed", lambda vae, images: images)
    found = evaluate(home, ["reconstruction"])["metrics"]["reconstruction"]
    assert found == {"psnr": 100.0, "ssim": pytest.approx(1.0), "num_samples": 20}


def test_a_pipeline_that_draws_the_truth_is_perfect(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(pipeline: Any, requests: Any, *_: Any) -> Any:
        for request in requests:
            picture = scene(0, request.seed, "val", 32)
            assert request.prompt == picture.caption
            flat = torch.frombuffer(bytearray(picture.image.tobytes()), dtype=torch.uint8)
            yield flat.view(32, 32, 3).permute(2, 0, 1)

    monkeypatch.setattr("ldm_cli.stages.support.eval_samples._generated", draw)
    found = evaluate(home, ["attribute_accuracy", "frechet_distance"], num_generated=20)["metrics"]
    rates = found["attribute_accuracy"]["generated"]["all"]
    assert {name: rate for name, rate in rates.items() if not name.startswith("num_") and rate not in (1, None)} == {}
    distance = next(value for name, value in found["frechet_distance"].items() if name.startswith("fd["))
    assert distance == pytest.approx(0, abs=1e-4)


def test_results_are_not_overwritten_unless_told(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.json"
    target.write_text("{}")
    with pytest.raises(OutputError, match=r"mine\.json"):
        run(recipe(home, ["reconstruction"]), RunOptions(device="cpu", out=target), SilentReporter())
    assert target.read_text() == "{}"
    run(recipe(home, ["reconstruction"]), RunOptions(device="cpu", out=target, overwrite=True), SilentReporter())
    assert "psnr" in target.read_text()


@pytest.mark.parametrize(("metric", "missing"), [("clip_score", "clip"), ("zero_shot", "zero_shot"),
                         ("reconstruction", "vae"), ("attribute_accuracy", "pipeline")])  # fmt: skip
def test_a_metric_without_its_model_is_a_recipe_error(home: Path, metric: str, missing: str) -> None:
    with pytest.raises(ValidationError, match=f"{metric} needs eval.{missing}"):
        recipe(home, [metric], **{missing: [] if missing == "zero_shot" else None})


def test_sizes_that_cannot_be_measured_are_refused(home: Path) -> None:
    with pytest.raises(RecipeError, match="multiple of 2"):
        evaluate(home, ["reconstruction"], data={"image_size": 33})
    with pytest.raises(RecipeError, match=r"at eval\.sampling: 16x32"):
        evaluate(home, ["attribute_accuracy"], sampling={"width": 16, "height": 32})


def test_class_names_come_from_the_data(home: Path) -> None:
    task = {"name": "background", "label": "json:background"}
    names = sorted({scene(0, i, "val", 32).truth["background"] for i in range(20)})
    found = evaluate(home, ["zero_shot"], zero_shot=[task, task | {"name": "named", "classes": names}])
    measured = found["metrics"]["zero_shot"]
    assert measured["background"] == measured["named"]
    assert measured["background"]["num_classes"] == len(names) > 1
    with pytest.raises(DataError, match="the samples have 0 different texts at 'json:class', expected at least 2"):
        evaluate(home, ["zero_shot"], zero_shot=[{"name": "class"}])
    with pytest.raises(ValidationError, match="label: json:class takes names from the data"):
        evaluate(home, ["zero_shot"], zero_shot=[{"name": "class", "label": "cls"}])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"label": "json:nothing", "classes": ["a", "b"]}, "none of 20 samples has 'json:nothing'"),
        ({"label": "json:background", "classes": ["white", "black"]}, "of no class"),
        ({"label": "json:num_objects", "classes": ["none", "one"]}, "'json:num_objects' is 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(home: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(home, ["zero_shot"], zero_shot=[{"name": "task", **task}])


def test_samples_without_ground_truth_are_named_before_anything_is_drawn(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from PIL import Image
    from webdataset import TarWriter

    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, format="PNG")
    with TarWriter(str(tmp_path / "plain.tar"), encoder=False) as tar:
        tar.write({"__key__": "only", "png": png.getvalue(), "txt": b"a photo", "json": b"{}"})
    monkeypatch.setattr("ldm_cli.stages.support.eval_samples._generated", lambda *_: pytest.fail("drew pictures"))
    with pytest.raises(DataError, match="plain/only"):
        evaluate(home, ["attribute_accuracy"], data={"shards": str(tmp_path / "plain.tar")})


@pytest.mark.parametrize(
    ("part", "name", "metrics", "culprit"),
    [
        ("clip", "visual_projection.weight", ["retrieval"], "the CLIP's features of images are not finite"),
        ("clip", "text_model.final_layer_norm.weight", ["clip_score"], "the CLIP's features of texts are not finite"),
        ("vae", "decoder.conv_out.weight", ["reconstruction"], "the reconstructions of eval.vae are not finite"),
        ("pipeline/unet", "conv_out.bias", ["clip_score"], "with seed 0 is not finite"),
        ("pipeline/vae", "decoder.conv_out.bias", ["frechet_distance"], "with seed 0 is not finite"),
    ],
)
def test_a_model_that_overflows_is_named_and_gives_no_numbers(
    home: Path, tmp_path: Path, part: str, name: str, metrics: list[str], culprit: str
) -> None:
    shutil.copytree(home, tmp_path / "home")
    file = next((tmp_path / "home" / part).glob("*.safetensors"))
    tensors = load_file(file)
    huge = torch.full_like(tensors[name], 3e38)
    save_file(tensors | {name: huge}, file)
    asked = recipe(tmp_path / "home", metrics, sampling={"steps": 2, "guidance": 3.0})
    with pytest.raises(DivergedError, match=culprit):
        run(asked, RunOptions(device="cpu", out=tmp_path / "out"), SilentReporter())
    assert not (tmp_path / "out" / "eval.json").exists()

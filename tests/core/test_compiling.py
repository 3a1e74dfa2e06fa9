"""Compiled regions: traced whole in every model and step, in place, with the results of the layers they replace.

`traced` has torch trace and differentiate the regions but leaves out its code generator, which takes a minute; the
exhaustive tests run that too, in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from ldm_cli.bench.workload import new_model, random_batch, simple_loss
from ldm_cli.core import compiling
from ldm_cli.core.compiling import compile_regions, eagerly
from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip_resnet import Bottleneck
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.scenes import write_scenes
from ldm_cli.recipe.load import load_recipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.training import trainer
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder

from ..conftest import REPOSITORY
from ..faults.matrix import different
from ..sampling.tiny import UNET, loaded_pipeline, tiny_pipeline
from ..stages.tiny import vae_recipe

SMALL = {
    "train-unet": (
        "bench/unet",
        [
            "unet.block_out_channels=[32,64]",
            "unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D]",
            "unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D]",
            "train.batch_size=2",
        ],
    ),
    "train-vae": ("bench/vae", ["train.batch_size=2", "data.image_size=16"]),
    "train-clip": ("bench/clip", ["train.batch_size=3"]),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch has traced, while nothing is generated for them."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend=backend, **how))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    torch.compiler.reset()
    return graphs


def one_step(subject: str, checkpointing: bool, compiled: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss of one batch, and the gradients by name."""
    recipe: Any = load_recipe(*SMALL[subject], expected_command=subject).recipe
    torch.manual_seed(0)
    model = new_model(recipe)
    batch = random_batch(recipe, recipe.train.batch_size, "cpu", 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # the last layers of residual branches start at zero
                parameter.normal_(std=0.02)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        compile_regions(model)
    loss = simple_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "checkpointing"),
    [
        ("train-vae", True),
        pytest.param("train-vae", False, marks=pytest.mark.exhaustive),
        pytest.param("train-unet", True, marks=pytest.mark.exhaustive),
        pytest.param("train-unet", False, marks=pytest.mark.exhaustive),
        pytest.param("train-clip", True, marks=pytest.mark.exhaustive),
        pytest.param("train-clip", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_step_has_the_loss_and_gradients_of_a_plain_one(
    traced: list[Any], subject: str, checkpointing: bool
) -> None:
    loss, gradients = one_step(subject, checkpointing, compiled=False)
    assert traced == []
    compiled_loss, compiled_gradients = one_step(subject, checkpointing, compiled=True)
    assert len(traced) >= 2
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert list(compiled_gradients) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_resnet_image_tower_is_compiled(traced: list[Any]) -> None:
    block = Bottleneck(8, 4, 2).eval()
    x = torch.randn(2, 8, 8, 8)
    expected = block(x)
    compile_regions(block)
    torch.testing.assert_close(block(x), expected)
    assert len(traced) == 1


@pytest.mark.slow
def test_compiling_changes_neither_keys_nor_what_runs_eagerly(traced: list[Any]) -> None:
    one_level = {"block_out_channels": (16,), "down_block_types": UNET["down_block_types"][:1]}
    one_level |= {"up_block_types": UNET["up_block_types"][1:]}
    denoiser = UNet2DConditionModel(UNet2DConditionConfig(**UNET | one_level)).eval()
    keys = list(denoiser.state_dict())
    compile_regions(denoiser)
    assert list(denoiser.state_dict()) == keys
    x, t, condition = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), Condition(tokens=torch.randn(2, 5, 24))
    with eagerly():
        plain = denoiser(x, t, condition)
    assert traced == []
    torch.testing.assert_close(denoiser(x, t, condition), plain, rtol=1e-5, atol=1e-5)
    num_graphs = len(traced)
    assert num_graphs > 0
    denoiser(x, t, condition)
    assert len(traced) == num_graphs  # what was seen before is not traced again


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"guidance": {"scale": 1.0, "perturb": {"layers": ["down_blocks"]}}},  # both calls of one shape
        pytest.param({"guidance": 3.0}, marks=pytest.mark.exhaustive),
        pytest.param({"guidance": {"scale": 3.0, "interval": [0.5, 10.0]}, "steps": 9}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_pipeline_draws_the_same_pictures_in_any_company(
    traced: list[Any], tmp_path: Path, fields: dict[str, Any]
) -> None:
    tiny_pipeline().family.save(tmp_path)
    requests = [ImageRequest(prompt, seed) for prompt in ("a red circle", "a blue square") for seed in (0, 7)]
    config = SamplingConfig.from_mapping({"steps": 3, "sampler": "ddim"} | fields)

    def drawn(pipeline: Pipeline, chosen: list[ImageRequest]) -> Tensor:
        return torch.stack([image.pixels for image in pipeline.generate(chosen, config)]).int()

    plain = drawn(loaded_pipeline(tmp_path), requests)
    assert traced == []
    compiled = loaded_pipeline(tmp_path, compiled=True)
    pictures = drawn(compiled, requests)
    assert len(traced) > 0
    assert (pictures - plain).abs().max() <= 1
    assert torch.equal(drawn(compiled, requests[2:3]), pictures[2:3])


@pytest.mark.parametrize(
    ("setting", "device", "pays_off", "problem", "expected", "told"),
    [
        ("auto", "cuda", True, None, True, [compiling.NOTICE]),
        ("auto", "cuda", True, "no triton", False, ["not compiled, which is slower: no triton"]),
        ("auto", "cuda", False, None, False, []),
        ("auto", "cpu", True, None, False, []),
        (True, "cpu", False, "no triton", True, [compiling.NOTICE]),  # whoever asks for it is told by an error
        (False, "cuda", True, None, False, []),
    ],
)
def test_auto_compiles_long_work_on_a_gpu_that_has_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
    setting: Any,
    device: str,
    pays_off: bool,
    problem: str | None,
    expected: bool,
    told: list[str],
) -> None:
    monkeypatch.setattr(compiling, "compiler_problem", lambda _: problem)
    lines: list[str] = []
    assert compiling.should_compile(setting, torch.device(device), pays_off, lines.append) is expected
    assert lines == told


def test_a_compiler_that_fails_is_a_line(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("cannot find triton\nmore about it")

    compiled = torch.compile
    compiling.compiler_problem.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=backend))
    problem = compiling.compiler_problem(torch.device("cpu"))
    assert problem == "RuntimeError: cannot find triton"
    compiling.compiler_problem.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=aot_eager))
    assert compiling.compiler_problem(torch.device("cpu")) is None
    compiling.compiler_problem.cache_clear()


@pytest.mark.parametrize(("steps", "is_compiled"), [(999, False), (1000, True)])
def test_a_trainer_compiles_long_runs_by_itself(
    steps: int, is_compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(trainer, "compile_regions", compiled.append)
    monkeypatch.setattr(trainer, "should_compile", lambda setting, _, pays_off, __: setting == "auto" and pays_off)
    task: Any = SimpleNamespace(modules={"model": nn.Linear(2, 2)}, auxiliary={})
    run = RunFolder(tmp_path, SilentReporter())
    trainer.Trainer(task, TrainConfig(steps=steps, batch_size=1), run, torch.device("cpu"), Ranks())
    assert compiled == [task.modules["model"]] * is_compiled


def test_replayed_networks_are_captured_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: modes.append(how["mode"]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    compiling.compile_whole(nn.Linear(2, 2), replayed=True)
    compiling.compile_whole(nn.Linear(2, 2))
    assert modes == ["reduce-overhead", None]


def test_a_sharded_run_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="strategy=sharded does not work with compile=true"):
        TrainConfig(steps=1, batch_size=1, strategy="sharded", compile=True)


def ldm(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own with compiled code in `cache`: torch's compiler keeps threads, and tests fork."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, "-m", "ldm_cli", *arguments, "--device", "cpu"]
    return subprocess.run(command, env=inherited | own, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 40, 32, 0, SilentReporter(), val_samples=6, shard_samples=16)
    return folder


@pytest.mark.exhaustive
def test_without_a_compiler_it_is_one_line_and_69(scenes: Path, tmp_path: Path) -> None:
    (recipe := tmp_path / "recipe.json").write_text(json.dumps(vae_recipe(scenes, compile=True)))
    result = ldm(tmp_path, "train-vae", str(recipe), "--out", str(tmp_path / "run"), CXX="/bin/false")
    assert result.returncode == 69, result.stderr
    assert "ldm: error: torch cannot compile the model: " in result.stderr
    assert result.stderr.splitlines()[-1].endswith("or set compile=false [E-UNAVAILABLE]")


@pytest.mark.exhaustive
def test_a_compiled_run_that_is_lost_and_continued_ends_the_same(scenes: Path, tmp_path: Path) -> None:
    content = vae_recipe(scenes, compile=True, steps=8, save_every=3, ema_decay=0.9, validate_every=4)
    (file := tmp_path / "recipe.json").write_text(json.dumps(content))
    given = (content["command"], str(file))
    for name, more in (("whole", ()), ("cut", ("--max-time", "0.01s")), ("cut", ())):
        result = ldm(tmp_path, *given, "--out", str(tmp_path / name), *more)
        assert result.returncode == (75 if more else 0), result.stderr
    assert different(tmp_path / "whole", tmp_path / "cut") is None
    assert [*(tmp_path / "ldm/compiled").rglob("*.so")]


@pytest.mark.exhaustive
def test_compiled_pictures_are_the_plain_ones_up_to_rounding_and_can_be_repeated(tmp_path: Path) -> None:
    tiny_pipeline().family.save(tmp_path / "model")
    words = ["sample", "--model", str(tmp_path / "model"), "-p", "a red circle", "-n", "3", "--steps", "4"]

    def drawn(name: str, *arguments: str) -> Image.Image:
        result = ldm(tmp_path, *arguments, "--out", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
        assert ("torch compiles the model" in result.stderr + result.stdout) == (name != "plain")
        return Image.open(sorted((tmp_path / name).glob("0*.png"))[-1])

    plain, compiled = drawn("plain", *words), drawn("compiled", *words, "--compile")
    apart = ImageChops.difference(plain.convert("RGB"), compiled.convert("RGB"))
    assert max(most for _, most in apart.getextrema()) <= 1
    again = drawn("again", "sample", "--repeat", str(tmp_path / "compiled" / Path(compiled.filename).name))
    assert again.tobytes() == compiled.tobytes()

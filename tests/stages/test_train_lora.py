"""`ldm train-unet` with `lora`: adapters are trained, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from ldm_cli.errors import InputNotFoundError
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.storage import file_sha256
from ldm_cli.training import saving
from ldm_cli.training.saving import num_checkpoint_bytes
from ldm_cli.training.trainer import Trainer
from tests.faults.runs import assert_same_run

from .published_xl import write_published_xl
from .tiny import assert_resumes, lose_after, trained, unet_recipe
from .tiny_xl import save_tiny_xl, xl_recipe

EVERYTHING = {
    "rank": 2,
    "alpha": 0.3,
    "targets": ["all"],
    "conv_rank": 3,
    "text_encoder": 1,
    "dropout": 0.1,
    "dora": True,
}


def lora_recipe(scenes: Path, start: Path, lora: Any = None, **train: Any) -> dict[str, Any]:
    recipe = unet_recipe(scenes, Path(), Path(), {"caption_dropout": 0.2}, **{"lr": 1e-2, **train})
    kept = {name: value for name, value in recipe.items() if name not in ("unet", "vae", "text_encoder")}
    return kept | {"start_from": str(start), "lora": dict(lora or {"rank": 2})}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion XL with random weights."""
    folder = tmp_path_factory.mktemp("xl")
    save_tiny_xl(folder)
    return folder


def xl_lora_recipe(scenes: Path, start: Path, lora: Any = None, **train: Any) -> dict[str, Any]:
    return lora_recipe(scenes, start, lora, **train) | {"data": xl_recipe(scenes, {})["data"]}


def files(folder: Path) -> dict[str, str]:
    return {str(file): file_sha256(file) for file in sorted(folder.rglob("*.safetensors"))}


def test_a_run_trains_adapters_and_leaves_its_model_alone(scenes: Path, unet_run: Path, tmp_path: Path) -> None:
    before = files(unet_run)
    result = trained(lora_recipe(scenes, unet_run, EVERYTHING, steps=4, ema_decay=0.9), tmp_path / "run")
    assert files(unet_run) == before
    assert sorted(file.name for file in (tmp_path / "run/model").iterdir()) == [
        "manifest.json",
        "pytorch_lora_weights.safetensors",
        "tiny.safetensors",
    ]
    ups = {n: t for n, t in load_file(tmp_path / "run/model/tiny.safetensors").items() if n.endswith("lora_up.weight")}
    assert all(up.abs().max() > 0 for up in ups.values())
    assert any(name.startswith("lora_te_") for name in ups)
    assert any(up.ndim == 4 for up in ups.values())
    assert result["figures"]["val_loss"] > 0


def test_a_lost_run_ends_in_the_same_bits(scenes: Path, unet_run: Path, tmp_path: Path) -> None:
    recipe = lora_recipe(scenes, unet_run, EVERYTHING, steps=4, save_every=2, log_every=2, ema_decay=0.9)
    assert_resumes(recipe, tmp_path, 2)


def test_all_networks_of_xl_are_adapted_in_half_precision_with_recomputed_layers(
    scenes: Path, xl: Path, tmp_path: Path
) -> None:
    lora = EVERYTHING | {"base_precision": "bf16"}
    half = {"precision": "bf16", "gradient_checkpointing": True, "ema_decay": 0.9}
    recipe = xl_lora_recipe(scenes, xl, lora, steps=2, save_every=1, log_every=1, validation_samples=4, **half)
    trained(recipe, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/model/tiny.safetensors")
    with safe_open(tmp_path / "whole/model/tiny.safetensors", "pt") as opened:
        found = opened.metadata()
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    prefixes = {"_".join(name.split("_")[:2]) for name in tensors}
    assert prefixes == {"lora_unet", "lora_te1", "lora_te2"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    idle = {name for name, up in tensors.items() if name.endswith("lora_up.weight") and not up.any()}
    # The states are those of the layer before the last one; of the first tower the last is not used at all.
    assert all(name.startswith("lora_te1_text_model_encoder_layers_1_") for name in idle)
    lose_after(1, recipe, tmp_path / "lost")
    trained(recipe, tmp_path / "lost")
    assert_same_run(tmp_path / "whole", tmp_path / "lost", 2)


def test_a_base_in_half_precision_changes_only_rounding(scenes: Path, xl: Path, tmp_path: Path) -> None:
    """Autocast rounds the weights of a base in fp32, too."""
    found = []
    for base in ("fp32", "bf16"):
        lora, short = {"rank": 2, "dora": True, "base_precision": base}, {"steps": 2, "validation_samples": 4}
        found.append(trained(xl_lora_recipe(scenes, xl, lora, precision="bf16", **short), tmp_path / base)["figures"])
    assert found[1]["val_loss"] == pytest.approx(found[0]["val_loss"], rel=2e-2)
    assert found[1] != found[0]


def test_parts_of_a_batch_and_recomputed_layers_change_only_rounding(
    scenes: Path, unet_run: Path, tmp_path: Path
) -> None:
    moments = []
    for name, train in (("whole", {}), ("parts", {"micro_batch": 2, "gradient_checkpointing": True})):
        trained(lora_recipe(scenes, unet_run, EVERYTHING, steps=1, **train), tmp_path / name)
        moments.append(load_file(tmp_path / name / "checkpoints/step-00000001/training.safetensors"))
    whole, parts = moments
    names = [name for name in whole if name.endswith("exp_avg")]
    assert names
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-7) for name in names)


def test_a_folder_of_adapters_is_no_model(scenes: Path, unet_run: Path, tmp_path: Path) -> None:
    trained(lora_recipe(scenes, unet_run, steps=1), tmp_path / "run")
    with pytest.raises(InputNotFoundError, match="it holds adapters") as caught:
        resolve_model(tmp_path / "run")
    assert "--lora" in str(caught.value.remedy)


def test_a_dry_run_counts_adapters_and_compares_the_memory(scenes: Path, unet_run: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping(lora_recipe(scenes, unet_run, {"rank": 2, "targets": ["*.attn1.to_q"]}))
    result = dry_run(recipe, SilentReporter())
    parameters = result["parameters"]
    assert parameters["unet.lora"] == 4 * 2 * (8 + 8)  # one down, one in the middle, two up; rank · (I + O) each
    assert result["bytes"]["gradients"] == 4 * parameters["unet.lora"]
    assert any(note.startswith("lora: weights, gradients") for note in result["notes"])


@pytest.mark.parametrize("text_encoder", [False, 3])
def test_a_dry_run_of_xl_counts_every_adapter_and_halves_what_bf16_holds(
    text_encoder: Any, scenes: Path, xl: Path
) -> None:
    lora = {"rank": 2, "targets": ["all"], "conv_rank": 5, "text_encoder": text_encoder, "dora": True}
    found = {}
    for base in ("fp32", "bf16"):
        recipe = xl_lora_recipe(scenes, xl, lora | {"base_precision": base}, precision="bf16", ema_decay=0.9)
        found[base] = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())
    counted, sizes = found["bf16"]["parameters"], found["bf16"]["bytes"]
    adapted = ["unet", "text_encoder", "text_encoder_2"] if text_encoder else ["unet"]
    family = open_family(xl)
    networks = [family.denoiser, *family.encoder.models]  # type: ignore[attr-defined]
    models = dict(zip(["unet", "text_encoder", "text_encoder_2"], networks, strict=True))
    for name in adapted:
        expected = 0
        for path, module in models[name].named_modules():
            is_chosen = "." in path if name == "unet" else ".self_attn." in path or ".mlp." in path
            if is_chosen and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                rows, kernel = len(module.weight), module.weight[0, 0].numel()
                rank = 5 if kernel > 1 else 2 if name == "unet" else 3
                expected += rank * (module.weight[0].numel() + rows) + rows  # down, up, norms
        assert counted[f"{name}.lora"] == expected
    num_trained = sum(counted[f"{name}.lora"] for name in adapted)
    assert [sizes[name] for name in ("gradients", "optimizer", "ema")] == [factor * num_trained for factor in (4, 8, 4)]
    assert found["fp32"]["bytes"]["weights"] - sizes["weights"] == 2 * sum(counted[name] for name in adapted)


@pytest.mark.parametrize("text_encoder", [False, 3])
def test_a_run_holds_the_bytes_that_its_dry_run_says(
    text_encoder: Any, scenes: Path, xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 2, "text_encoder": text_encoder, "base_precision": "bf16"}
    short = {"steps": 1, "validation_samples": 4, "ema_decay": 0.9, "precision": "bf16"}
    recipe = xl_lora_recipe(scenes, xl, lora, **short)
    sizes = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())["bytes"]
    made: list[Any] = []
    make = Trainer.__init__

    def watched(self: Trainer, *given: Any) -> None:
        made.append(self)
        make(self, *given)

    monkeypatch.setattr(Trainer, "__init__", watched)
    trained(recipe, tmp_path / "run")
    (trainer,) = made
    family = trainer.task._base.family
    adapters, models = trainer.modules.values(), (family.denoiser, family.codec, *family.encoder.models)
    parameters = [parameter for module in (*adapters, *models) for parameter in module.parameters()]
    assert sum(parameter.nbytes for parameter in parameters) == sizes["weights"]
    assert sum(parameter.nbytes for parameter in parameters if parameter.requires_grad) == sizes["gradients"]
    state = trainer.optimizers.state()
    moments = sum(value.nbytes for name, value in state.items() if "exp_avg" in name)
    # The last layer of the first tower is not used, so that its adapters never have a gradient.
    first = trainer.modules["text_encoder"].named_parameters() if text_encoder else ()
    idle = sum(parameter.numel() for name, parameter in first if ".layers.1." in name)
    assert moments == sizes["optimizer"] - 8 * idle


@pytest.mark.exhaustive  # the dry run itself is a command of docs/guides/memory-and-time.md
def test_adapters_of_the_published_xl_take_a_fifth_of_the_memory_of_all_weights(tmp_path: Path) -> None:
    """Rank 16 of the transformers: 10 blocks of width 640 within 5 of them, 60 of 1280 within 6, text of 2048."""
    write_published_xl(tmp_path)
    recipe = load_recipe("lora/sdxl", [f"start_from={tmp_path}"]).recipe
    found = dry_run(recipe, SilentReporter())
    attention = {width: 4 * 2 * width + 2 * 2 * width + 2 * (2048 + width) for width in (640, 1280)}
    blocks = {width: attention[width] + (1 + 8) * width + (4 + 1) * width for width in (640, 1280)}
    adapters = 16 * (10 * blocks[640] + 5 * 4 * 640 + 60 * blocks[1280] + 6 * 4 * 1280)
    others = 83_653_863 + 123_060_480 + 694_659_840
    assert found["parameters"]["unet.lora"] == adapters
    assert found["parameters"]["unet"] == 2_567_463_684
    assert found["bytes"]["weights"] == 4 * (adapters + others) + 2 * 2_567_463_684
    total = 16 * adapters + 4 * others + 2 * 2_567_463_684
    note = f"take {total / 2**30:.3f} GiB; to train all weights, {(16 * 2_567_463_684 + 4 * others) / 2**30:.2f} GiB"
    assert found["notes"][0].endswith(note)


def test_the_room_for_a_checkpoint_counts_both_files_of_adapters(
    scenes: Path, unet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def watched(trainer: Any) -> int:
        counted.append(num_checkpoint_bytes(trainer))
        return counted[-1]

    monkeypatch.setattr(saving, "num_checkpoint_bytes", watched)
    lora = {"rank": 256, "targets": ["all"]}
    trained(lora_recipe(scenes, unet_run, lora, steps=1, ema_decay=0.9), tmp_path / "run")
    files = (tmp_path / "run/checkpoints/step-00000001").rglob("*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    assert written <= counted[0] <= written + 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None}, "lora needs start_from"),
        ({"freeze": ["*"]}, "lora freezes all weights"),
        ({"cache": "c", "lora": {"text_encoder": True}}, "changes the text states"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: Any, message: str, scenes: Path, unet_run: Path) -> None:
    recipe = lora_recipe(scenes, unet_run) | {"vae": "v", "text_encoder": "t", "unet": {}} | changes
    with pytest.raises(ValidationError, match=message):
        TrainUnetRecipe.from_mapping(recipe)

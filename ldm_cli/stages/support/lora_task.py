"""The training of adapters in place of a denoiser: the task of any denoiser, with its models frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm_cli.core.compiling import compile_regions
from ldm_cli.core.lora import Adapters, chosen_ranks
from ldm_cli.core.lora_config import TEXT_TARGETS, LoRAConfig
from ldm_cli.core.low_rank import LowRank
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.batch import Batch
from ldm_cli.errors import RecipeError, amount
from ldm_cli.families.adapted import adaptable_models, adaptable_networks
from ldm_cli.families.family import Family, place
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.stable_diffusion_3 import StableDiffusion3
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL
from ldm_cli.formats.lora_path import DIFFUSERS_LORA
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER
from ldm_cli.formats.single_file_sd3 import transformer_table
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.stages.support.denoising_task import DenoisingTask
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, training_bytes
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.task import WeightsByModule
from ldm_cli.training.trainer import is_compiled_on


class LoRATask:
    """Train adapters of a denoiser and, if asked to, of its text encoders; loss and data are those of `base`.

    Args:
        base: its denoiser holds the weights of `start_from`.
    """

    def __init__(self, base: DenoisingTask, recipe: TrainRecipe, lora: LoRAConfig, bench: Workbench) -> None:
        self._base, self._recipe = base, recipe
        train = recipe.train
        if lora.base_precision == "bf16" and train.precision != "bf16":
            raise RecipeError("lora.base_precision=bf16 cannot be used", f"train.precision is {train.precision}")
        self._networks = adaptable_networks(base.family)
        self.modules = {
            name: Adapters(self._networks[name].to(DTYPES[lora.base_precision]), ranks, lora, seed=recipe.seed)
            for name, ranks in lora_ranks(lora, self._networks).items()
        }
        self.auxiliary: dict[str, nn.Module] = {}
        self.num_files = 2
        for name in self.modules:
            place(bench.device, DTYPES[lora.base_precision], self._networks[name], channels_last=train.channels_last)
            if is_compiled_on(bench.device, train, lambda message: None):
                compile_regions(self._networks[name])
        base.encoder.trains_text = len(self.modules) > 1

    def prepare(self, batch: Batch) -> Batch:
        """See `base`."""
        return self._base.prepare(batch)

    def parts(self, batch: Batch, num_parts: int) -> Sequence[Batch]:
        """See `base`."""
        return self._base.parts(batch, num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `base`; a dropped condition has gradients, too, where the text encoders are adapted."""
        if self._base.encoder.trains_text:
            self._set_samples(None)
            self._base.encode_empty()
        self._set_samples((part.epoch, part.position))
        return self._base.loss(part, step)

    def _set_samples(self, samples: tuple[Tensor, Tensor] | None) -> None:
        for adapters in self.modules.values():
            adapters.samples = samples

    def validate(self) -> dict[str, float]:
        """See `base`."""
        return self._base.validate()

    def picture(self, folder: Path | None) -> None:
        """See `base`."""
        self._base.picture(folder)

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the adapters as two files: `pytorch_lora_weights.safetensors` for diffusers, and `NAME.safetensors` in
        kohya's layout, from which `restore` reads."""
        updates = {name: adapters.low_rank(weights[name]) for name, adapters in self.modules.items()}
        metadata = _metadata(self._base.family, self._recipe)
        write_lora(folder / DIFFUSERS_LORA, updates, "diffusers", metadata)
        tables, family = {}, self._base.family
        if isinstance(family, StableDiffusion3):
            tables[TRANSFORMER] = transformer_table(family.denoiser.config.to_mapping())
        write_lora(folder / f"{self._recipe.name}.safetensors", updates, "kohya", metadata, tables)

    def restore(self, folder: Path) -> None:
        """Read the adapters of `export` back."""
        models = adaptable_models({name: self._networks[name] for name in self.modules})
        found = read_lora(folder / f"{self._recipe.name}.safetensors", models)
        for name, adapters in self.modules.items():
            # A kohya file has zeros for those of queries, keys and values that are not adapted.
            own = {path: one for path, one in found.get(name, {}).items() if path in adapters.modules_by_path}
            adapters.load_low_rank({path: one for path, one in own.items() if isinstance(one, LowRank)})

    def finalize(self) -> dict[str, float]:
        """See `base`."""
        return self._base.finalize()


def lora_ranks(lora: LoRAConfig, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """Component → path of an adapted module → rank.

    Args:
        networks: the denoiser first, then the text encoders, by component; on the meta device, too.

    Raises:
        RecipeError: as in `chosen_ranks`.
    """
    denoiser, *towers = networks
    ranks = {denoiser: chosen_ranks(networks[denoiser], lora.targets, lora.rank, lora.conv_rank)}
    if lora.text_encoder:
        rank = lora.rank if lora.text_encoder is True else lora.text_encoder
        ranks |= {name: chosen_ranks(networks[name], TEXT_TARGETS, rank) for name in towers}
    return ranks


def lora_parameters(
    lora: LoRAConfig, train: TrainConfig, models: Mapping[str, nn.Module | None], notes: list[str]
) -> Parameters:
    """The sizes of a recipe with adapters, on the meta device; see `model_sizes.py`.

    Args:
        train: of the recipe.
        models: all that the recipe uses, by component, the denoiser first; None: it does not exist yet.
        notes: receives a line that compares the memory with that of training all weights.
    """
    present = {name: model for name, model in models.items() if model is not None}
    denoiser = next(iter(models))
    networks = {name: present[name] for name in (denoiser, TEXT_ENCODER, TEXT_ENCODER_2) if name in present}
    frozen = {name: count_parameters(model) for name, model in present.items()}
    trained = {
        f"{name}.lora": count_parameters(Adapters(networks[name], ranks, lora))
        for name, ranks in lora_ranks(lora, networks).items()
    }
    adapted = {name.removesuffix(".lora") for name in trained}
    own = training_bytes(trained, frozen, train, halved=adapted if lora.base_precision == "bf16" else ())
    others = {name: count for name, count in frozen.items() if name not in adapted}
    full = training_bytes({name: frozen[name] for name in adapted}, others, train)
    sizes = [amount(sum(size for name, size in sizes.items() if name != "save")) for sizes in (own, full)]
    notes.append(f"lora: weights, gradients, moments and averages take {sizes[0]}; to train all weights, {sizes[1]}")
    return trained, frozen


def _metadata(family: Family, recipe: TrainRecipe) -> dict[str, str]:
    """What files of adapters say about their training, as kohya's scripts write it."""
    width = getattr(getattr(family.denoiser, "config", None), "cross_attention_dim", None)
    if isinstance(family, StableDiffusionXL):
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"
    elif isinstance(family, StableDiffusion3):
        version, architecture = "sd3", "stable-diffusion-3/lora"
    elif width == 1024:
        version, architecture = "sd_v2", "stable-diffusion-v2-512/lora"
    else:
        version, architecture = "sd_v1", "stable-diffusion-v1/lora"
    size, train = recipe.data.image_size, recipe.train
    return {
        "ss_base_model_version": version,
        "modelspec.architecture": architecture,
        "modelspec.resolution": f"{size}x{size}",
        "ss_resolution": f"({size}, {size})",
        "ss_max_train_steps": str(train.steps),
        "ss_total_batch_size": str(train.batch_size),
        "ss_learning_rate": f"{train.lr:g}",
        "ss_optimizer": train.optimizer,
        "ss_seed": str(recipe.seed),
    }

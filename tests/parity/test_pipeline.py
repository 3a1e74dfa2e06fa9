"""Pipeline folders against diffusers and transformers, in both directions, from the same initial latents."""

import json
from typing import get_args

import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.scheduler_file import read_scheduler
from ldm_cli.sampling.config import SamplerName, SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents, scheduler, their_folder
from tests.sampling.tiny import loaded_pipeline, tiny_pipeline

diffusers = pytest.importorskip("diffusers")


def our_images(pipeline, **fields):
    config = SamplingConfig(**({"steps": 5, "guidance": 7.5, "negative": NEGATIVE} | fields))
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in pipeline.generate(requests, config, latents())])


def their_images(folder, sampler=None, **options):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        # Stable Diffusion's own file says clip_sample: false for the sake of DDIM; PNDM has no such key.
        extra = {"clip_sample": False} if sampler == "ddim" else {}
        pipeline.scheduler = type(scheduler(sampler)).from_config(pipeline.scheduler.config, **extra)
    result = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=5,
        latents=latents(),
        output_type="np",
        **({"guidance_scale": 7.5} | options),
    )
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def assert_equal_pictures(ours, theirs):
    assert ours.shape == theirs.shape == (2, 3, 16, 16)
    assert ours.float().std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_pndm_folder_written_by_diffusers_is_sampled_as_diffusers_samples_it(tmp_path, sampler):
    folder = their_folder(tmp_path, scheduler("pndm"))
    assert_equal_pictures(our_images(loaded_pipeline(folder), sampler=sampler), their_images(folder, sampler))


def test_the_last_layer_but_one_of_the_text_encoder_is_what_diffusers_calls_one(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.CLIPTextModel, "text_model"):  # diffusers looks for the norm there
        monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda tower: tower), raising=False)
    folder = their_folder(tmp_path, scheduler("ddim"))
    # Without guidance: diffusers takes the last layer of the negative prompt all the same.
    ours = our_images(loaded_pipeline(folder), sampler="ddim", clip_skip=2, guidance=1.0)
    assert_equal_pictures(ours, their_images(folder, clip_skip=1, guidance_scale=1.0))
    assert not torch.equal(ours, our_images(loaded_pipeline(folder), sampler="ddim", guidance=1.0))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_folder_with_the_sampler_of_the_same_name_gives_the_same_pictures(tmp_path, name):
    folder = their_folder(tmp_path, scheduler(name))
    assert_equal_pictures(our_images(loaded_pipeline(folder), sampler=name), their_images(folder))


def write_scheduler_file(folder, name, fields):
    """Only what differs from the defaults of the class, which some cannot be made without SciPy."""
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": name, **fields})


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
BY_CLASS = [
    ("DDIMScheduler", {**STABLE, "clip_sample": False, "set_alpha_to_one": False}, "ddim"),
    ("DDIMScheduler", {**STABLE, **ZERO_SNR, "clip_sample": False}, "ddim"),
    ("PNDMScheduler", {**STABLE, "skip_prk_steps": True}, "pndm"),
    ("PNDMScheduler", {**STABLE, "skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 0}, "pndm"),
    ("EulerDiscreteScheduler", {**STABLE, "timestep_spacing": "leading"}, "euler"),
    ("EulerDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "euler"),
    ("EulerDiscreteScheduler", {**STABLE, "use_karras_sigmas": True, "prediction_type": "v_prediction"}, "euler"),
    ("EulerDiscreteScheduler", {**STABLE, **ZERO_SNR}, "euler"),
    ("HeunDiscreteScheduler", {**STABLE, "timestep_spacing": "trailing"}, "heun"),
    ("KDPM2DiscreteScheduler", STABLE, "dpm2"),
    ("DPMSolverMultistepScheduler", {**STABLE, "use_karras_sigmas": True}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, "dpmpp_2m"),
    ("UniPCMultistepScheduler", {**STABLE, "timestep_spacing": "leading"}, "unipc"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow_euler"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 1.5}, "flow_heun"),
]


@pytest.mark.parametrize(("name", "fields", "sampler"), BY_CLASS)
def test_scheduler_in_a_folder_chooses_sampler_and_levels_as_in_diffusers(tmp_path, monkeypatch, name, fields, sampler):
    scheduler_class = getattr(diffusers, name)
    if name.startswith("FlowMatch"):
        # Without it this pipeline of diffusers cannot start; their folders exist all the same.
        monkeypatch.setattr(scheduler_class, "init_noise_sigma", 1.0, raising=False)
    folder = their_folder(tmp_path, scheduler_class(**fields))
    pipeline = loaded_pipeline(folder)
    assert pipeline.family.settings.sampler == sampler
    found = our_images(pipeline)
    assert_equal_pictures(found, their_images(folder))
    assert torch.equal(found, our_images(pipeline, sampler=sampler))
    # DDIM and Euler's methods are the same move: on the same levels they agree.
    assert sampler in ("ddim", "euler", "flow_euler") or not torch.equal(found, our_images(pipeline, sampler="ddim"))


@pytest.mark.parametrize(
    ("name", "fields", "sampler"),
    [
        ("DDPMScheduler", {}, "ddpm"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
        ("LMSDiscreteScheduler", {}, "lms"),
        ("LCMScheduler", {}, "lcm"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp_3m_sde"),
        ("DPMSolverSinglestepScheduler", {}, "dpmpp_2m"),
        ("DEISMultistepScheduler", {}, "dpmpp_2m"),
        ("KDPM2AncestralDiscreteScheduler", {}, "dpmpp_2s_ancestral"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "flow_euler"),
    ],
)
def test_every_other_scheduler_chooses_its_sampler_or_the_nearest(tmp_path, name, fields, sampler):
    write_scheduler_file(tmp_path, name, fields)
    assert read_scheduler(tmp_path).sampler == sampler
    assert sampler in get_args(SamplerName)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "random"}),
        ("EulerDiscreteScheduler", {"sigma_min": 0.0, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"sigma_max": "high"}),
        ("LCMScheduler", {"original_inference_steps": -1}),
    ],
)
def test_what_a_scheduler_asks_for_and_we_cannot_do_is_refused_by_name(tmp_path, name, fields):
    write_scheduler_file(tmp_path, name, fields)
    with pytest.raises(CheckpointError, match=f"{next(iter(fields))}=.* is not supported"):
        read_scheduler(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
     "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LCM"],
)  # fmt: skip
def test_fields_that_a_scheduler_file_leaves_out_are_those_of_its_class(tmp_path, name):
    write_scheduler_file(tmp_path, f"{name}Scheduler", {})
    theirs = getattr(diffusers, f"{name}Scheduler")().config
    found = read_scheduler(tmp_path).diffusion
    assert found == {field: theirs.get(field, False) for field in found}


def test_file_of_stable_diffusion_1_is_read_with_each_samplers_own_spacing(tmp_path):
    folder = their_folder(tmp_path, scheduler("pndm"))
    file = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    for absent in ("timestep_spacing", "prediction_type", "trained_betas"):
        del content[absent]
    file.write_text(json.dumps(content))
    for sampler in ("ddim", "euler"):
        assert_equal_pictures(our_images(loaded_pipeline(folder), sampler=sampler), their_images(folder, sampler))


@pytest.mark.parametrize(
    "diffusion",
    [DiffusionConfig(), DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)],
    ids=["epsilon", "zero-snr"],
)
def test_folder_that_we_write_opens_in_diffusers_and_gives_the_same_pictures(tmp_path, diffusion):
    pipeline = tiny_pipeline(diffusion, scaling_factor=0.7, shift_factor=0.3)
    before = our_images(pipeline)
    pipeline.family.save(tmp_path)
    expected = their_images(tmp_path)
    assert_equal_pictures(before, expected)
    assert_equal_pictures(our_images(loaded_pipeline(tmp_path)), expected)

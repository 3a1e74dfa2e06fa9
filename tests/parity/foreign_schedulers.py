"""Every field of diffusers' schedulers, and what becomes of it: whole trajectories of a network that is a formula.

The pipelines of Stable Diffusion set `steps_offset` to 1 and `clip_sample` to false, whatever the file says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
from torch import Tensor

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.diffusion.samplers import clean_predictor
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.scheduler_file import read_scheduler
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import denoise
from tests.parity.foreign import Content, Foreign, parameters_of
from tests.parity.test_all_samplers import ToyNetwork, initial_noise, step_noise

STEPS = 6
OF_THE_PIPELINE = {"steps_offset": 1, "clip_sample": False}


def ours(name: str, content: Content) -> tuple[Tensor, list[float]]:
    """x_0, and the times that the network was given."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scheduler").mkdir()
        write_json(Path(folder) / "scheduler" / "scheduler_config.json", {"_class_name": name, **content})
        settings = read_scheduler(Path(folder))
    process = process_of(DiffusionConfig.from_mapping(settings.diffusion))
    network = ToyNetwork(process.prediction.name)
    model, config = clean_predictor(network, process.prediction), SamplingConfig(steps=STEPS)
    return denoise(model, initial_noise().double(), process, settings, config, step_noise), network.times


def trajectories(name: str) -> Callable[[Content], tuple[Tensor, Tensor]]:
    def both(content: Content) -> tuple[Tensor, Tensor]:
        found, times = ours(name, content)
        scheduler_class = getattr(diffusers, name)
        fields = {k: v for k, v in OF_THE_PIPELINE.items() if k in parameters_of(scheduler_class.__init__)}
        scheduler = scheduler_class(**{**content, **fields})
        prediction = "flow_prediction" if name.startswith("FlowMatch") else scheduler.config.prediction_type
        network, draws = ToyNetwork(prediction), iter(range(10**6))
        scheduler.set_timesteps(STEPS)
        x = initial_noise().double() * getattr(scheduler, "init_noise_sigma", 1.0)
        module = __import__(scheduler_class.__module__, fromlist=["randn_tensor"])
        drawn = mock.Mock(side_effect=lambda *args, **kwargs: step_noise(next(draws)))
        with mock.patch.object(module, "randn_tensor", drawn, create=True):
            for t, time in zip(scheduler.timesteps, times, strict=True):
                # diffusers cuts or rounds some times where we do not.
                assert abs(float(t) - time) <= 1.0
                shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(network(shown, time), t, x).prev_sample
        assert 0.02 < found.abs().max() < 100, "a degenerate comparison proves nothing"
        return found, x

    return both


BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
COMMON: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.002],
    "beta_end": [0.02],
    "beta_schedule": ["linear", {"": "squaredcos_cap_v2", "prediction_type": "v_prediction"}],
    "prediction_type": ["v_prediction", "sample"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
}
# At the cosine schedule's σ = 20 000 the float32 of diffusers rounds to 1e-3: test_pipeline compares pictures of it.
ON_SIGMA: dict[str, list[Any]] = {
    "beta_schedule": ["linear"],
    "use_karras_sigmas": [True, *({"": True, "timestep_spacing": s} for s in ("leading", "trailing"))],
    "use_exponential_sigmas": [True, *({"": True, "timestep_spacing": s} for s in ("leading", "trailing"))],
}
ENDS: dict[str, list[Any]] = {
    "sigma_min": [{"": 0.1, "use_karras_sigmas": True}, {"": 0.2, "use_exponential_sigmas": True}, 0.1],
    "sigma_max": [{"": 5.0, "use_karras_sigmas": True}, {"": 7.0, "use_exponential_sigmas": True}, 5.0],
}
CLIPPING = {"clip_sample": True, "clip_sample_range": 0.5}
THRESHOLDING = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5}
OFFSET = {"steps_offset": 3}
TRAINED = {"trained_betas": [0.01] * 1000}


def without(values: dict[str, list[Any]], name: str) -> dict[str, list[Any]]:
    return {key: value for key, value in values.items() if key != name}


def scheduler(
    name: str, honoured: dict[str, list[Any]], refused: dict[str, Any], harmless: dict[str, Any], **base: Any
) -> Foreign:
    names = parameters_of(getattr(diffusers, name).__init__)
    content = {**BASE, **base} if "beta_start" in names else base
    file = "scheduler/scheduler_config.json"
    return Foreign(name, file, names, content, trajectories(name), honoured, refused, harmless)


SCHEDULERS = (
    scheduler(
        "DDIMScheduler",
        {**COMMON, "rescale_betas_zero_snr": [ZERO_SNR, None], "set_alpha_to_one": [False, None]},
        {**TRAINED, "thresholding": True},
        {**CLIPPING, **THRESHOLDING, **OFFSET},
    ),
    scheduler(
        "DDPMScheduler",
        {**COMMON, "rescale_betas_zero_snr": [ZERO_SNR], "variance_type": ["fixed_small_log"]},
        {**TRAINED, "thresholding": True},
        {**CLIPPING, **THRESHOLDING, **OFFSET},
    ),
    scheduler(
        "PNDMScheduler",
        {**without(COMMON, "timestep_spacing"), "set_alpha_to_one": [True], "prediction_type": ["v_prediction"]},
        {**TRAINED, "skip_prk_steps": False, "timestep_spacing": "trailing"},
        OFFSET,
        skip_prk_steps=True,
    ),
    scheduler(
        "EulerDiscreteScheduler",
        {**COMMON, **ON_SIGMA, **ENDS, "rescale_betas_zero_snr": [ZERO_SNR]},
        {
            **TRAINED,
            "use_beta_sigmas": True,
            "interpolation_type": "log_linear",
            "timestep_type": "continuous",
            "final_sigmas_type": "sigma_min",
        },
        OFFSET,
    ),
    scheduler(
        "EulerAncestralDiscreteScheduler",
        {
            **COMMON,
            "beta_schedule": ["linear"],
            "prediction_type": ["v_prediction"],
            "rescale_betas_zero_snr": [ZERO_SNR],
        },
        TRAINED,
        OFFSET,
    ),
    scheduler("HeunDiscreteScheduler", {**COMMON, **ON_SIGMA}, {**TRAINED, "use_beta_sigmas": True}, CLIPPING | OFFSET),
    scheduler(
        "KDPM2DiscreteScheduler",
        {**COMMON, **ON_SIGMA, "prediction_type": ["v_prediction"]},
        {**TRAINED, "use_beta_sigmas": True},
        OFFSET,
    ),
    scheduler(
        "DPMSolverMultistepScheduler",
        {
            **COMMON,
            **ON_SIGMA,
            "beta_schedule": COMMON["beta_schedule"],
            "rescale_betas_zero_snr": [ZERO_SNR],
            "algorithm_type": ["sde-dpmsolver++"],
        },
        {
            **TRAINED,
            "thresholding": True,
            "solver_order": 3,
            "solver_type": "heun",
            "use_beta_sigmas": True,
            "use_lu_lambdas": True,
            "use_flow_sigmas": True,
            "final_sigmas_type": "sigma_min",
            "lambda_min_clipped": -5.1,
            "variance_type": "learned_range",
            "use_dynamic_shifting": True,
        },
        {
            **THRESHOLDING,
            **OFFSET,
            "lower_order_final": False,
            "euler_at_final": True,
            "flow_shift": 3.0,
            "time_shift_type": "linear",
        },
    ),
    scheduler(
        "UniPCMultistepScheduler",
        {**ON_SIGMA, **COMMON, **ENDS, "rescale_betas_zero_snr": [ZERO_SNR]},
        {
            **TRAINED,
            "thresholding": True,
            "solver_order": 3,
            "solver_type": "bh1",
            "predict_x0": False,
            "lower_order_final": False,
            "disable_corrector": [0],
            "solver_p": {"_class_name": "DDIMScheduler"},
            "use_beta_sigmas": True,
            "use_flow_sigmas": True,
            "final_sigmas_type": "sigma_min",
            "use_dynamic_shifting": True,
            "shift_terminal": 0.1,
        },
        {**THRESHOLDING, **OFFSET, "flow_shift": 3.0, "time_shift_type": "linear"},
    ),
    scheduler(
        "LCMScheduler",
        {
            **without(COMMON, "timestep_spacing"),
            "rescale_betas_zero_snr": [{"": True, "prediction_type": "v_prediction"}],
            "original_inference_steps": [20, 100],
        },
        {**TRAINED, "thresholding": True, "timestep_scaling": 5.0},
        {**CLIPPING, **THRESHOLDING, **OFFSET, "set_alpha_to_one": False, "timestep_spacing": "trailing"},
    ),
    scheduler(
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": [500], "shift": [3.0, 0.5]},
        {
            "use_dynamic_shifting": True,
            "invert_sigmas": True,
            "shift_terminal": 0.1,
            "use_karras_sigmas": True,
            "use_exponential_sigmas": True,
            "use_beta_sigmas": True,
            "stochastic_sampling": True,
        },
        {
            "base_shift": 0.6,
            "max_shift": 2.0,
            "base_image_seq_len": 100,
            "max_image_seq_len": 5000,
            "time_shift_type": "linear",
        },
    ),
    scheduler("FlowMatchHeunDiscreteScheduler", {"num_train_timesteps": [500], "shift": [3.0, 0.5]}, {}, {}),
)

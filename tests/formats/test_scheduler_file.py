import json
import math

import pytest

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.scheduler_file import our_settings, read_scheduler, write_scheduler

SOLVERS = ("PNDM", "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")


def put_scheduler(folder, **content):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("zero_snr", [False, True])
def test_scheduler_settings_survive_a_round_trip(tmp_path, zero_snr):
    kind = "v_prediction" if zero_snr else "epsilon"
    settings = our_settings(
        {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr, "beta_start": 0.001, "snr_gamma": 5.0}
    )
    assert settings.timestep_spacing == ("trailing" if zero_snr else "leading")
    assert "snr_gamma" not in settings.diffusion
    write_scheduler(tmp_path, settings, settings.scheduler_class)
    assert read_scheduler(tmp_path) == settings


@pytest.mark.parametrize("name", SOLVERS)
def test_stable_diffusion_settings_are_read_from_every_solvers_file(tmp_path, name):
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    other = {"skip_prk_steps": True, "clip_sample": True, "steps_offset": 0}
    put_scheduler(tmp_path, _class_name=f"{name}Scheduler", **stable, **other)
    settings = read_scheduler(tmp_path)
    defaults = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    assert settings.diffusion == stable | defaults
    assert (settings.timestep_spacing, settings.set_alpha_to_one, settings.steps_offset) == (None, None, 1)


def test_flow_settings_survive_a_round_trip_as_a_solver_that_knows_flows(tmp_path):
    settings = our_settings({"prediction_type": "flow_prediction", "flow_shift": 3.0})
    write_scheduler(tmp_path, settings, settings.scheduler_class)
    assert read_scheduler(tmp_path) == settings
    assert settings.scheduler_class == "UniPCMultistepScheduler"
    content = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (content["use_flow_sigmas"], content["flow_shift"]) == (True, 3.0)
    with pytest.raises(CheckpointError, match="use_flow_sigmas"):
        read_scheduler(put_scheduler(tmp_path, **{**content, "prediction_type": "epsilon"}))
    with pytest.raises(CheckpointError, match="use_dynamic_shifting"):
        read_scheduler(put_scheduler(tmp_path, **{**content, "use_dynamic_shifting": True}))


@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_levels_by_sigma_are_read_from_a_scheduler_file(tmp_path, grid):
    content = {"_class_name": "DPMSolverMultistepScheduler", f"use_{grid}_sigmas": True}
    assert read_scheduler(put_scheduler(tmp_path, **content)).sigmas == grid
    assert read_scheduler(put_scheduler(tmp_path, _class_name="LCMScheduler")).sigmas is None


def test_values_that_a_scheduler_file_leaves_out_are_those_of_diffusers(tmp_path):
    settings = read_scheduler(put_scheduler(tmp_path, _class_name="DDIMScheduler"))
    assert settings.diffusion["beta_schedule"] == "linear"
    assert (settings.diffusion["beta_start"], settings.diffusion["beta_end"]) == (0.0001, 0.02)


def test_schedulers_of_another_family_are_refused_by_name(tmp_path):
    for content, message in [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEuler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal"),
        ({"beta_start": 0.1}, "None"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_scheduler(put_scheduler(tmp_path, **content))


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "50"])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("LCMScheduler", "original_inference_steps"),
        ("EulerDiscreteScheduler", "sigma_min"),
        ("UniPCMultistepScheduler", "sigma_max"),
    ],
)
def test_a_field_that_must_be_positive_is_refused_by_name(tmp_path, name, field, value):
    with pytest.raises(CheckpointError, match=f"{field}="):
        read_scheduler(put_scheduler(tmp_path, _class_name=name, **{field: value}))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"sigma_min": 6.0, "sigma_max": 5.0}, "sigma_min=6.0, sigma_max=5.0"),
        ({"sigma_min": 5, "sigma_max": 5}, "sigma_min=5, sigma_max=5"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
    ],
)
def test_fields_that_contradict_one_another_are_refused_by_name(tmp_path, content, named):
    with pytest.raises(CheckpointError, match=f"{named} is not supported"):
        read_scheduler(put_scheduler(tmp_path, _class_name="EulerDiscreteScheduler", **content))


@pytest.mark.parametrize("name", [None, ["DDIMScheduler"], {"a": 1}, 3, "EDMEulerScheduler"])
def test_a_class_that_is_not_supported_is_refused_whatever_stands_there(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"scheduler .* is not supported"):
        read_scheduler(put_scheduler(tmp_path, _class_name=name))

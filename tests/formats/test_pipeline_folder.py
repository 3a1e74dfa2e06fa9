import json

import pytest
import torch
from torch import nn

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.pipeline_folder import (
    check_index,
    fold_latent_shift,
    our_settings,
    read_scheduler,
    write_index,
    write_scheduler,
)

SOLVERS = (
    "PNDM",
    "DDIM",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "UniPCMultistep",
)


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
    write_scheduler(tmp_path, settings)
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


def test_values_that_a_scheduler_file_leaves_out_are_those_of_diffusers(tmp_path):
    settings = read_scheduler(put_scheduler(tmp_path, _class_name="DDIMScheduler"))
    assert settings.diffusion["beta_schedule"] == "linear"
    assert (settings.diffusion["beta_start"], settings.diffusion["beta_end"]) == (0.0001, 0.02)


def test_schedulers_of_another_family_are_refused_by_name(tmp_path):
    for content, message in [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ({"beta_start": 0.1}, "None"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_scheduler(put_scheduler(tmp_path, **content))


def test_folder_without_pipeline_is_not_found_and_another_pipeline_is_refused(tmp_path):
    with pytest.raises(InputNotFoundError, match=r"model_index\.json"):
        check_index(tmp_path)
    write_index(tmp_path)
    check_index(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(CheckpointError, match="StableDiffusion3Pipeline"):
        check_index(tmp_path)


def test_folded_shift_moves_the_mean_and_leaves_the_decoder_what_it_saw():
    torch.manual_seed(0)
    quant, post = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
    state = {f"quant_conv.{k}": v for k, v in quant.state_dict().items()}
    state |= {f"post_quant_conv.{k}": v for k, v in post.state_dict().items()}
    folded = fold_latent_shift(state, 0.7)
    moments, z = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    expected_mean, expected_logvar = quant(moments).chunk(2, dim=1)
    expected = post(z)
    quant.load_state_dict(
        {k.removeprefix("quant_conv."): v for k, v in folded.items() if k.startswith("quant")}
    )
    post.load_state_dict(
        {k.removeprefix("post_quant_conv."): v for k, v in folded.items() if k.startswith("post")}
    )
    mean, logvar = quant(moments).chunk(2, dim=1)
    torch.testing.assert_close(mean, expected_mean - 0.7)
    torch.testing.assert_close(logvar, expected_logvar)
    torch.testing.assert_close(post(z - 0.7), expected)


def test_shift_cannot_be_folded_without_the_convolutions_around_the_latent():
    assert fold_latent_shift({"decoder.conv_in.weight": torch.zeros(1)}, 0.5) is None

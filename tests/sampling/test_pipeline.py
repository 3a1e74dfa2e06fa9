import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ldm_cli import philox
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.stable_diffusion import check_fit
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.formats.scheduler_file import SchedulerSettings
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import visited_timesteps
from ldm_cli.sampling.pixels import decode_pixels
from ldm_cli.sampling.request import Blend, ImageRequest, requests_for
from tests.sampling.tiny import UNET, loaded_pipeline, tiny_pipeline

QUICK = {"steps": 3, "images_per_prompt": 1}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.family.save(folder)
    return folder


def pictures(pipeline, requests, **fields):
    config = SamplingConfig(**(QUICK | fields))
    return {image.request: image.pixels for image in pipeline.generate(requests, config)}


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "ddpm", "width": 48, "height": 40},  # 480 latent pixels: two images per call
        {"sampler": "dpmpp_2m", "guidance": 1.0},
        {"sampler": "euler", "precision": "bf16"},
        {"sampler": "dpmpp_2m_sde", "steps": 8},  # enough steps for a short group to be filled up less
    ],
    ids=lambda fields: fields["sampler"],
)
def test_picture_of_a_prompt_and_seed_is_the_same_bit_for_bit_in_any_company(saved, fields):
    pipeline = loaded_pipeline(saved, precision=fields.get("precision", "fp32"))
    prompts = ("a red circle", "a blue square at the top left", "")
    requests = [ImageRequest(prompt, seed) for prompt in prompts for seed in (0, 7, 123456789012)]
    requests.append(ImageRequest("a red circle", 1))
    together = pictures(pipeline, requests, **fields)
    assert len(together) == len(requests)
    assert len({tuple(p.flatten().tolist()) for p in together.values()}) == len(requests)
    shuffled = requests.copy()
    random.Random(0).shuffle(shuffled)
    for batch_size in (1, 3, 8):
        for start in range(0, len(shuffled), batch_size):
            part = pictures(pipeline, shuffled[start : start + batch_size], batch_size=batch_size, **fields)
            for request, pixels in part.items():
                assert torch.equal(pixels, together[request])


def test_pictures_depend_on_seed_prompt_negative_prompt_guidance_steps_and_eta(pipeline):
    def one(prompt="a red circle", seed=0, **fields):
        return tuple(pictures(pipeline, [ImageRequest(prompt, seed)], **fields).popitem()[1].flatten().tolist())

    variants = [
        one(),
        one(seed=1),
        one("a blue square"),
        one(negative="green"),
        one(guidance=3.0),
        one(guidance=1.0),
        one(steps=4),
        one(eta=0.5),
        one(sampler="dpmpp_2m"),
    ]
    assert len(set(variants)) == len(variants)
    assert one() == variants[0]
    assert one(guidance=1.0, negative="green") == variants[5], "without guidance there is nothing to steer away from"


def test_requests_go_prompt_by_prompt_with_consecutive_seeds():
    config = SamplingConfig(images_per_prompt=3, seed=5)
    requests = requests_for(["a", "b"], config)
    assert [(r.prompt, r.seed) for r in requests] == [("a", 5), ("a", 6), ("a", 7), ("b", 5), ("b", 6), ("b", 7)]


def test_given_latents_take_the_place_of_the_seeds_noise_in_the_order_of_the_requests(pipeline):
    requests = [ImageRequest("a red circle", seed) for seed in (3, 4)]
    config = SamplingConfig(**QUICK)
    zero = torch.zeros(1, dtype=torch.int64)
    noise = torch.cat([philox.normal(philox.key(s, "sampling: initial noise"), zero, zero, (4, 8, 8)) for s in (3, 4)])
    given = [image.pixels for image in pipeline.generate(requests, config, noise)]
    drawn = [image.pixels for image in pipeline.generate(requests, config)]
    assert all(torch.equal(a, b) for a, b in zip(given, drawn, strict=True))
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\).*\(2, 4, 8, 8\)"):
        list(pipeline.generate(requests, config, noise[:1]))


def test_pixels_are_bytes_of_the_asked_size(pipeline):
    for fields, shape in [({}, (3, 16, 16)), ({"width": 24, "height": 16}, (3, 16, 24))]:
        pixels = pictures(pipeline, [ImageRequest("a", 0)], **fields).popitem()[1]
        assert pixels.shape == shape
        assert pixels.dtype == torch.uint8


def test_decoding_clamps_and_rounds_to_the_nearest_byte(pipeline, monkeypatch):
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    monkeypatch.setattr(pipeline.family.codec, "decode", lambda latents: values.expand(len(latents), 3, 1, 6))
    assert decode_pixels(pipeline.family.codec, torch.zeros(1, 4, 8, 8))[0][0, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_prompts_that_are_cut_are_reported_once_with_what_was_cut(pipeline):
    reporter = SilentReporter()
    long = "red circle " * 60 + "zebra"
    config = SamplingConfig(**QUICK)
    list(pipeline.generate([ImageRequest(long, 0), ImageRequest(long, 1)], config, reporter=reporter))
    assert len(reporter.messages) == 1
    assert "38 tokens" in reporter.messages[0]
    assert "zebra" in reporter.messages[0]


def test_impossible_sizes_and_steps_are_usage_errors_with_a_remedy(pipeline):
    with pytest.raises(UsageError, match=r"width 31.*multiple of 2.*take 32"):
        pictures(pipeline, [ImageRequest("a", 0)], width=31)
    for distilled, steps in ((50, 60), (25, 26), (20, 1000)):
        settings = SchedulerSettings({}, num_distilled=distilled)
        with pytest.raises(UsageError, match=f"lcm cannot take {steps} steps: .* distilled at {distilled} levels"):
            visited_timesteps(pipeline.family.process, settings, SamplingConfig(sampler="lcm", steps=steps))
    with pytest.raises(UsageError, match="1000 noise levels"):
        pictures(pipeline, [ImageRequest("a", 0)], sampler="dpmpp_2m", steps=1000)


def test_saved_pipeline_loads_with_the_same_weights_and_draws_the_same_pictures(pipeline, saved):
    loaded = loaded_pipeline(saved)
    for parts in [lambda f: f.denoiser, lambda f: f.codec, lambda f: f.encoder.model]:
        ours, theirs = parts(pipeline.family).state_dict(), parts(loaded.family).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert loaded.family.settings == pipeline.family.settings
    assert loaded.family.encoder.length == 40
    request = ImageRequest("a red circle", 0)
    difference = pictures(loaded, [request])[request].int() - pictures(pipeline, [request])[request].int()
    assert difference.abs().max() <= 1
    assert set(loaded.family.weights_sha256) == {"unet", "vae", "text_encoder"}
    assert pipeline.family.weights_sha256 == {}


def test_latent_shift_is_folded_into_the_autoencoder_without_changing_anything(tmp_path):
    shifted = tiny_pipeline(scaling_factor=0.7, shift_factor=0.4)
    shifted.family.save(tmp_path)
    loaded = loaded_pipeline(tmp_path)
    assert loaded.family.codec.config.shift_factor is None
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before, after = shifted.family.codec, loaded.family.codec
        latents = before.encode(image)
        torch.testing.assert_close(after.encode(image), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(after.posterior(image).logvar, before.posterior(image).logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(after.decode(latents), before.decode(latents), rtol=0, atol=1e-5)


def test_parts_that_do_not_fit_together_are_named(tmp_path):
    folder = tmp_path
    pipeline = tiny_pipeline()
    pipeline.family.save(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    good = read_json(scheduler)
    for changes, message in [
        ({"_class_name": "TCDScheduler"}, "TCDScheduler"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"rescale_betas_zero_snr": True}, "zero_snr"),
    ]:
        write_json(scheduler, good | changes)
        with pytest.raises(CheckpointError, match=message):
            loaded_pipeline(folder)
    write_json(scheduler, good)
    write_json(folder / "model_index.json", {"_class_name": "FluxPipeline"})
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        loaded_pipeline(folder)
    family = pipeline.family
    wider = UNet2DConditionModel(UNet2DConditionConfig(**(UNET | {"cross_attention_dim": 32})))
    with pytest.raises(CheckpointError, match=r"cross_attention_dim=32, text_encoder.hidden_size=24"):
        check_fit(None, wider.config, family.codec, {"text_encoder": family.encoder})
    classes = UNet2DConditionModel(UNet2DConditionConfig(**(UNET | {"num_class_embeds": 5})))
    with pytest.raises(
        CheckpointError, match=r"the parts of the model do not fit: unet\.num_class_embeds=5 asks for a condition"
    ):
        check_fit(None, classes.config, family.codec, {"text_encoder": family.encoder})


def test_progress_counts_the_calls_of_the_predictor(pipeline):
    seen = []

    class Watching(SilentReporter):
        @contextmanager
        def progress(self, title, total, done=0, unit="step"):
            yield SimpleNamespace(update=lambda done, figures=None: seen.append((done, figures)))

    config = SamplingConfig(steps=3, sampler="heun")
    assert len(list(pipeline.generate([ImageRequest("a", 0)], config, reporter=Watching()))) == 1
    assert seen == [*((0, {"calls": count}) for count in range(1, 6)), (1, None)]


def test_zero_snr_model_is_sampled_from_its_last_level(tmp_path):
    diffusion = DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline = tiny_pipeline(diffusion)
    seen = []
    forward = pipeline.family.denoiser.forward
    pipeline.family.denoiser.forward = lambda x, t, context: (seen.append(float(t[0])), forward(x, t, context))[1]
    pictures(pipeline, [ImageRequest("a", 0)], steps=4)
    assert seen[-4:] == [999, 749, 499, 249], "calls before them try how few rows will do"


def test_long_and_short_prompts_of_a_job_give_the_pictures_of_jobs_of_their_own():
    pipeline = tiny_pipeline(context_length=12)
    long, blend = "a red circle, a blue square left of a green", Blend(prompt="red BREAK blue", seed=3, weight=0.3)
    requests = [ImageRequest("a red circle", 1), ImageRequest(long, 1), ImageRequest(long, 2), ImageRequest("a", 1)]
    requests.append(ImageRequest("a red circle", 2, blend))
    for negative in ("", "a red circle, a blue square left of BREAK a triangle"):
        config = SamplingConfig(steps=2, guidance=3.0, width=8, height=8, long_prompts=True, negative=negative)
        together = list(pipeline.generate(requests, config))
        assert [image.index for image in together] == [0, 1, 2, 3, 4]
        for image, request in zip(together, requests, strict=True):
            (alone,) = pipeline.generate([request], config)
            assert torch.equal(alone.pixels, image.pixels)
    messages = SilentReporter()
    (cut,) = pipeline.generate(requests[1:2], config.model_copy(update={"long_prompts": False}), reporter=messages)
    assert not torch.equal(cut.pixels, together[1].pixels)
    assert len(messages.messages) == 2, "prompt and negative prompt"


def test_another_layer_of_the_text_encoder_makes_another_picture_and_none_beyond_the_first_exists():
    pipeline, request = tiny_pipeline(), ImageRequest("a red circle", 1)
    config = SamplingConfig(steps=2, width=8, height=8)
    last, *others = (
        next(pipeline.generate([request], config.model_copy(update={"clip_skip": skip}))).pixels
        for skip in (1, None, 2)
    )
    assert torch.equal(last, others[0])
    assert not torch.equal(last, others[1])
    with pytest.raises(UsageError, match="clip_skip=3 is not possible: a text encoder has 2 layers"):
        next(pipeline.generate([request], config.model_copy(update={"clip_skip": 3})))

import random
import threading

import pytest
import torch

from ldm_cli import philox
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.errors import CheckpointError, InputNotFoundError, UsageError
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling import pipeline as pipeline_module
from ldm_cli.sampling.components import check_fit, load_text_encoder, resolve_model
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.fixed_rows import enough
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest, requests_for
from ldm_cli.sampling.sample_options import Extras
from tests.sampling.tiny import tiny_pipeline

QUICK = {"steps": 3, "images_per_prompt": 1}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save(folder)
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
    pipeline = Pipeline.load(saved, precision=fields.get("precision", "fp32"))
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


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "fields",
    [{"sampler": "ddim"}, {"sampler": "euler_ancestral", "width": 32, "height": 32}, {"guidance": 1.0}],
    ids=["guided", "larger", "unguided"],
)
def test_pictures_drawn_side_by_side_are_those_of_one_after_the_other(saved, fields, monkeypatch):
    pipeline, lanes = Pipeline.load(saved), set()
    draw = pipeline._draw

    def watched(*arguments):
        lanes.add((threading.current_thread().name, torch.get_num_threads()))
        return draw(*arguments)

    monkeypatch.setattr(pipeline, "_draw", watched)
    requests = requests_for(["a red circle", "a blue square"], SamplingConfig(images_per_prompt=10))
    together = pictures(pipeline, requests, **fields)
    if len(lanes) < 3:
        pytest.skip("one thread draws other bits than two here")
    assert lanes == {("ldm-lane_0", 1), ("ldm-lane_1", 1), ("MainThread", 2)}
    monkeypatch.setattr(pipeline_module, "lanes_here", lambda: 1)
    in_turn = pictures(pipeline, requests, **fields)
    assert list(together) == list(in_turn) == requests
    assert all(torch.equal(together[request], in_turn[request]) for request in requests)


@pytest.mark.usefixtures("two_threads")
def test_no_lane_draws_on_when_one_has_failed(pipeline, monkeypatch):
    forward, calls, lock = pipeline.unet.forward, [], threading.Lock()

    def fails_in_one_lane(x, timestep, context):
        with lock:
            calls.append(threading.current_thread().name)
        if calls[-1] == "ldm-lane_1" and calls.count("ldm-lane_1") == 3:
            raise ValueError("out of luck")
        return forward(x, timestep, context)

    requests = [ImageRequest("a red circle", seed) for seed in range(16)]
    list(pipeline.generate(requests, SamplingConfig(**QUICK)))  # so that no trial is counted
    monkeypatch.setattr(pipeline.unet, "forward", fails_in_one_lane)
    with pytest.raises(ValueError, match="out of luck"):
        list(pipeline.generate(requests, SamplingConfig(**QUICK | {"steps": 900})))
    assert len(calls) < 500


@pytest.mark.usefixtures("two_threads")
def test_pictures_that_are_looked_at_on_the_way_are_drawn_by_all_threads(pipeline, monkeypatch):
    seen = []
    extras = Extras(preview_every=2, on_preview=lambda images: seen.append((len(images), torch.get_num_threads())))
    requests = [ImageRequest("a red circle", seed) for seed in range(17)]
    assert len(list(pipeline.generate(requests, SamplingConfig(**QUICK), extras=extras))) == 17
    assert seen == [(8, 2), (8, 2), (1, 2)]


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
    assert [(r.prompt, r.seed) for r in requests] == [
        ("a", 5),
        ("a", 6),
        ("a", 7),
        ("b", 5),
        ("b", 6),
        ("b", 7),
    ]


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
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: values.expand(len(z), 3, 1, 6))
    assert pipeline.decode(torch.zeros(1, 4, 8, 8))[0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]


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
    with pytest.raises(UsageError, match="1000 noise levels"):
        pictures(pipeline, [ImageRequest("a", 0)], sampler="dpmpp_2m", steps=1000)


def test_saved_pipeline_loads_with_the_same_weights_and_draws_the_same_pictures(pipeline, saved):
    loaded = Pipeline.load(saved)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert loaded.settings == pipeline.settings
    assert loaded.context_length == 40
    request = ImageRequest("a red circle", 0)
    difference = pictures(loaded, [request])[request].int() - pictures(pipeline, [request])[request].int()
    assert difference.abs().max() <= 1
    assert set(loaded.weights_sha256) == {"unet", "vae", "text_encoder"}
    assert pipeline.weights_sha256 == {}


def test_latent_shift_is_folded_into_the_autoencoder_without_changing_anything(tmp_path):
    shifted = tiny_pipeline(scaling_factor=0.7, shift_factor=0.4)
    shifted.save(tmp_path)
    loaded = Pipeline.load(tmp_path)
    assert loaded.vae.config.shift_factor is None
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior, folded = shifted.vae.encode(image), loaded.vae.encode(image)
        latents = shifted.vae.to_latents(posterior.mode())
        torch.testing.assert_close(loaded.vae.to_latents(folded.mode()), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(folded.logvar, posterior.logvar, rtol=0, atol=1e-5)
        expected = shifted.vae.decode(shifted.vae.from_latents(latents))
        torch.testing.assert_close(loaded.vae.decode(loaded.vae.from_latents(latents)), expected, rtol=0, atol=1e-5)


def test_model_of_a_run_is_the_finished_one_else_the_average_of_its_newest_checkpoint(tmp_path):
    def put(*parts):
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        return folder

    with pytest.raises(InputNotFoundError, match="no model in"):
        resolve_model(tmp_path)
    plain, averaged = put("checkpoints", "step-00000900", "model"), put("checkpoints", "step-00000900", "ema")
    older = put("checkpoints", "step-00000100", "model")
    for checkpoint in (plain.parent, older.parent):
        (checkpoint / "manifest.json").write_text("{}")
    put("checkpoints", "step-00001000", "model")  # no manifest: not committed
    assert resolve_model(tmp_path) == averaged
    assert resolve_model(plain.parent) == averaged
    assert resolve_model(older.parent) == older
    finished = put("model")
    assert resolve_model(tmp_path) == finished
    assert resolve_model(finished) == finished
    with pytest.raises(InputNotFoundError, match="not found"):
        resolve_model(tmp_path / "nowhere")


def test_parts_that_do_not_fit_together_are_named(tmp_path):
    folder = tmp_path
    pipeline = tiny_pipeline()
    pipeline.save(folder)
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
            Pipeline.load(folder)
    write_json(scheduler, good)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    with pytest.raises(CheckpointError, match="StableDiffusionXLPipeline"):
        Pipeline.load(folder)
    pipeline.unet.config = pipeline.unet.config.model_copy(update={"cross_attention_dim": 32})
    with pytest.raises(CheckpointError, match=r"cross_attention_dim=32, text_encoder.hidden_size=24"):
        check_fit(folder, pipeline.unet, pipeline.vae, load_text_encoder(folder / "text_encoder"), pipeline.tokenizer)


def test_zero_snr_model_is_sampled_from_its_last_level(tmp_path):
    diffusion = DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline = tiny_pipeline(diffusion)
    seen = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t, context: (seen.append(float(t[0])), forward(x, t, context))[1]
    pictures(pipeline, [ImageRequest("a", 0)], steps=4)
    assert seen == [999, 749, 499, 249]


def test_a_short_group_is_filled_up_to_the_least_number_that_gives_the_same_bits():
    def agreeing_from(least):
        return lambda n: [torch.zeros(n), torch.arange(n) + (0.0 if n >= least else 1e-6)]

    assert [enough(agreeing_from(least), 1, 8) for least in (1, 2, 3, 5)] == [1, 2, 4, 8]
    assert [enough(agreeing_from(1), count, 8) for count in (3, 7, 8)] == [3, 7, 8]

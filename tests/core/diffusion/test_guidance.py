"""Guidance, term by term: what it reduces to, what it costs, and the published formulas written out."""

import pytest
import torch
from pydantic import ValidationError

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import (
    GuidanceConfig,
    PerturbationConfig,
    ProjectionConfig,
    ThresholdConfig,
)
from ldm_cli.core.diffusion.guidance import along_score, guide, guided, rescaled, thresholded
from ldm_cli.core.diffusion.prediction import PREDICTIONS, SAMPLE, V_PREDICTION
from ldm_cli.core.diffusion.process import Level

LEVEL = Level(500.0, 0.6, 0.8)
CONDITIONAL, UNCONDITIONAL = Condition(tokens=torch.full((2, 3, 4), 1.0)), Condition(tokens=torch.zeros(2, 3, 4))
KINDS = list(PREDICTIONS.values())


class Network:
    """Counts rows; its output depends on all that it is given, row by row."""

    def __init__(self, factor=1.0):
        self.factor = factor
        self.rows = []

    def __call__(self, x, level, condition):
        assert len(x) == len(condition.tokens)
        self.rows.append(len(x))
        shift = condition.tokens.mean(dim=(1, 2))[:, None]
        return torch.sin(self.factor * (x + level.t / 1000) + shift * (1 + x.roll(1, -1)))


def draw(rows=2):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(kind=V_PREDICTION, level=LEVEL, network=None, weaker=None, perturbed=None, **config):
    network = network or Network()
    model = guided(network, CONDITIONAL, UNCONDITIONAL, GuidanceConfig(**config), kind, weaker, perturbed)
    return model(draw(), level)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    without, having = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert guide(without, having, 0.0).tolist() == without.tolist()
    assert guide(without, having, 1.0).tolist() == having.tolist()
    assert guide(without, having, 3.0).tolist() == [4.0, -4.0]


@pytest.mark.parametrize("kind", KINDS, ids=list(PREDICTIONS))
def test_scale_one_is_the_conditional_and_zero_the_unconditional_network_in_one_call(kind):
    for scale, context in [(1.0, CONDITIONAL), (0.0, UNCONDITIONAL)]:
        network = Network()
        x0 = run(kind, network=network, scale=scale)
        alone = guided(Network(), context, context, GuidanceConfig(scale=1.0), kind)(draw(), LEVEL)
        assert torch.equal(x0, alone)
        assert network.rows == [2]


@pytest.mark.parametrize("kind", KINDS, ids=list(PREDICTIONS))
def test_guidance_of_any_prediction_is_the_guidance_of_x0(kind):
    network = Network()
    mixed = run(kind, network=network, scale=3.0)
    having, without = run(kind, scale=1.0), run(kind, scale=0.0)
    torch.testing.assert_close(mixed, without + 3.0 * (having - without), rtol=0, atol=1e-12)
    assert network.rows == [4], "both halves are one batch"


def test_every_row_has_its_own_negative_context():
    negatives = Condition(tokens=torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.5)]))
    config = GuidanceConfig(scale=4.0)
    together = guided(Network(), CONDITIONAL, negatives, config, SAMPLE)(draw(), LEVEL)
    for row in (0, 1):
        one = slice(row, row + 1)
        conditions = [condition.map(lambda tensor, one=one: tensor[one]) for condition in (CONDITIONAL, negatives)]
        alone = guided(Network(), *conditions, config, SAMPLE)(draw()[one], LEVEL)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize(
    "neutral",
    [
        {"rescale": 0.0},
        {"interval": (0.0, 1e9)},
        {"threshold": ThresholdConfig(percentile=1.0, limit=100.0)},
        {"perturb": PerturbationConfig(scale=0.0)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_neutral_settings_are_the_plain_path_bit_for_bit(neutral):
    assert torch.equal(run(scale=5.0, perturbed=Network(2.0), **neutral), run(scale=5.0))


def test_projection_that_keeps_everything_is_the_plain_guidance():
    everything = ProjectionConfig(parallel=1.0, norm=None, momentum=0.0)
    torch.testing.assert_close(run(scale=5.0, apg=everything), run(scale=5.0))


def test_outside_of_the_interval_the_conditional_network_runs_alone():
    sigma = LEVEL.sigma
    for interval, rows in [((0.0, 1.0), [2]), ((1.5, 9.0), [2]), ((1.0, 2.0), [4]), ((sigma, sigma), [4])]:
        network = Network()
        x0 = run(network=network, scale=5.0, interval=interval, rescale=0.5)
        assert network.rows == rows
        assert torch.equal(x0, run(scale=5.0, rescale=0.5) if rows == [4] else run(scale=1.0))


def test_rescaling_brings_the_deviation_of_each_image_back():
    output, conditional = 3.0 * draw(), draw() + 1.0
    torch.testing.assert_close(rescaled(output, conditional, 1.0).std(dim=1), conditional.std(dim=1))
    half = rescaled(output, conditional, 0.5)
    torch.testing.assert_close(half, 0.5 * (rescaled(output, conditional, 1.0) + output))


def test_thresholding_clips_to_the_percentile_and_scales_to_the_limit():
    x0 = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 2.0], [0.1, -0.2, 0.3, 0.4, 0.5]])
    clipped = thresholded(x0, ThresholdConfig(percentile=0.75, limit=1.0))
    assert clipped[0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert torch.equal(clipped[1], x0[1]), "what is within the limit stays"


def test_projection_leaves_out_the_parallel_part_limits_the_step_and_remembers_it():
    config = ProjectionConfig(parallel=0.0, norm=0.7, momentum=-0.5)
    model = guided(Network(), CONDITIONAL, UNCONDITIONAL, GuidanceConfig(scale=4.0, apg=config), SAMPLE)
    x, running = draw(), 0.0
    for level in (LEVEL, Level(300.0, 0.8, 0.6)):
        having, without = Network()(x, level, CONDITIONAL), Network()(x, level, UNCONDITIONAL)
        running = having - without - 0.5 * running
        step = running * (0.7 / running.norm(dim=1, keepdim=True)).clamp(max=1.0)
        parallel = (step * having).sum(1, keepdim=True) / having.square().sum(1, keepdim=True) * having
        torch.testing.assert_close(model(x, level), having + 3.0 * (step - parallel))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_perturbation_pushes_away_from_the_perturbed_network_with_the_prompt_that_counts(scale):
    perturbed = Network(2.0)
    x0 = run(SAMPLE, scale=scale, perturbed=perturbed, perturb=PerturbationConfig(scale=2.5))
    context = UNCONDITIONAL if scale == 0.0 else CONDITIONAL
    difference = Network()(draw(), LEVEL, context) - Network(2.0)(draw(), LEVEL, context)
    torch.testing.assert_close(x0, run(SAMPLE, scale=scale) + 2.5 * difference)
    assert perturbed.rows == [2]


def test_autoguidance_extrapolates_from_the_weaker_network_with_the_same_prompt():
    network, weaker = Network(), Network(0.5)
    x0 = run(SAMPLE, network=network, weaker=weaker, scale=2.0)
    strong, weak = Network()(draw(), LEVEL, CONDITIONAL), Network(0.5)(draw(), LEVEL, CONDITIONAL)
    torch.testing.assert_close(x0, weak + 2.0 * (strong - weak))
    assert (network.rows, weaker.rows) == ([2], [2])
    network, weaker = Network(), Network(0.5)
    assert torch.equal(run(SAMPLE, network=network, weaker=weaker, scale=1.0), strong)
    assert (network.rows, weaker.rows) == ([2], [])


def test_following_a_score_draws_from_the_tilted_distribution():
    # Data N(0, 1) with a score s · x_0 tilts its density by e^{s x_0}: N(s, 1), whose denoiser is known.
    tilt, x = 0.7, draw()
    a, b = LEVEL.signal, LEVEL.noise

    def denoise(x, level):
        return level.signal * x / (level.signal**2 + level.noise**2)

    steered = along_score(denoise, lambda x0: x0.sum(dim=1), tilt)(x, LEVEL)
    exact = tilt + a / (a**2 + b**2) * (x - a * tilt)
    torch.testing.assert_close(steered, exact)


def test_following_a_score_works_in_inference_mode_and_returns_plain_tensors():
    with torch.inference_mode():
        steered = along_score(lambda x, level: 0.5 * x, lambda x0: x0.square().sum(1), 1.0)(draw(), LEVEL)
    assert not steered.requires_grad
    assert torch.equal(along_score(lambda x, level: 0.5 * x, lambda x0: x0.sum(1), 0.0)(draw(), LEVEL), 0.5 * draw())


def test_contradictory_settings_are_refused():
    with pytest.raises(ValidationError, match=r"low 2.0 is above high 1.0"):
        GuidanceConfig(interval=(2.0, 1.0))
    with pytest.raises(ValidationError, match="choose one"):
        GuidanceConfig(rescale=0.5, apg=ProjectionConfig())

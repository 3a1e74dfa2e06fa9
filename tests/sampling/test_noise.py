import pytest
import torch

from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.noise import initial_noise, slerp, step_noise
from ldm_cli.sampling.request import Blend, ImageRequest, variations, walk


def test_slerp_reaches_both_ends_exactly_and_keeps_the_angle():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    third = slerp(a, b, 1 / 3)
    expected = 3 * torch.tensor([torch.pi / 6]).cos(), 3 * torch.tensor([torch.pi / 6]).sin()
    torch.testing.assert_close(third, torch.cat(expected))
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_noise_between_two_seeds_is_as_strong_as_theirs():
    ends = ImageRequest("a", 1), ImageRequest("b", 2)
    middle = ImageRequest("a", 1, Blend(prompt="b", seed=2, weight=0.5))
    noise = initial_noise([*ends, middle], (4, 32, 32))
    assert noise[2].std() == pytest.approx(1.0, abs=0.05)
    assert (noise[:2].mean(0)).std() < 0.75
    at_end = ImageRequest("a", 1, Blend(prompt="b", seed=2, weight=1.0))
    for source in (initial_noise([at_end, ends[1]], (4, 8)), step_noise([at_end, ends[1]], 3, (4, 8))):
        assert torch.equal(source[0], source[1]), "at the end of the way, also what samplers add is the other's"


def test_noise_is_of_the_seed_and_the_step_and_not_of_the_neighbours():
    requests = [ImageRequest("a", seed) for seed in range(4)]
    together = step_noise(requests, 5, (2, 3))
    for i, request in enumerate(requests):
        assert torch.equal(step_noise([request], 5, (2, 3))[0], together[i])
    assert not torch.equal(step_noise(requests, 6, (2, 3)), together)
    assert not torch.equal(initial_noise(requests, (2, 3)), step_noise(requests, 0, (2, 3)))


def test_variations_begin_with_the_picture_that_they_resemble():
    requests = variations("a", SamplingConfig(images_per_prompt=3, seed=5), 0.2)
    assert requests[0] == ImageRequest("a", 5)
    assert [(r.seed, r.blend.seed, r.blend.weight) for r in requests[1:]] == [(5, 6, 0.2), (5, 7, 0.2)]


def test_a_walk_passes_every_prompt_in_equal_steps():
    way = walk(["a", "b", "c"], [1, 2, 3], 4)
    assert [(r.prompt, r.blend.weight if r.blend else 0) for r in way] == [
        *(("a", k / 4) for k in range(4)),
        *(("b", k / 4) for k in range(4)),
        ("c", 0),
    ]
    assert way[5].blend == Blend(prompt="c", seed=3, weight=0.25)
    with pytest.raises(ValueError, match="1 prompts"):
        walk(["a"], [1], 4)

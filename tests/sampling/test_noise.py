import pytest
import torch

from ldm_cli import philox
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.noise import initial_noise, slerp, step_noise
from ldm_cli.sampling.request import Blend, ImageRequest, variations, walk

CPU = torch.device("cpu")


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
    noise = initial_noise([*ends, middle], (4, 32, 32), CPU)
    assert noise[2].std() == pytest.approx(1.0, abs=0.05)
    assert (noise[:2].mean(0)).std() < 0.75
    at_end = ImageRequest("a", 1, Blend(prompt="b", seed=2, weight=1.0))
    for source in (initial_noise([at_end, ends[1]], (4, 8), CPU), step_noise([at_end, ends[1]], (4, 8), CPU)(3)):
        assert torch.equal(source[0], source[1]), "at the end of the way, also what samplers add is the other's"


@pytest.mark.parametrize("shape", [(2, 3), (4, 8, 8), (3, 5, 7)])
def test_noise_is_of_the_seed_and_the_step_and_not_of_the_neighbours(shape):
    requests = [ImageRequest("a", seed) for seed in (0, 1, 2**40)]
    requests.append(ImageRequest("a", 3, Blend(prompt="b", seed=4, weight=0.3)))
    source = step_noise(requests, shape, CPU)
    together = source(5)
    for i, request in enumerate(requests):
        assert torch.equal(step_noise([request], shape, CPU)(5)[0], together[i])
    assert not torch.equal(source(6), together)
    assert not torch.equal(initial_noise(requests, shape, CPU), source(0))


def test_noise_is_philox_of_the_key_of_the_seed_at_the_position_of_the_step():
    zero = torch.zeros(1, dtype=torch.int64)
    for seed in (0, 7, 2**40):
        key = philox.key(seed, "sampling: step noise")
        expected = philox.normal(key, zero, zero + 5, (4, 8))
        assert torch.equal(step_noise([ImageRequest("a", seed)], (4, 8), CPU)(5), expected)


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

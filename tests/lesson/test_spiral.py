import math

import pytest
import torch

from ldm_cli.lesson.spiral import NUM_CLASSES, class_probabilities, data_set, nearest, point_at


def test_the_data_are_standardized_and_evenly_spaced_along_the_arm():
    data = data_set(2000, seed=3)
    assert data.xy.mean(dim=0).norm() < 0.01
    assert float(data.xy.square().sum(dim=1).mean()) == pytest.approx(2.0, abs=0.01)
    position, distance = nearest(data.xy)
    assert distance.max() < 0.005
    assert torch.histc(position.float(), 10, 0.0, 1.0).tolist() == pytest.approx([200] * 10, abs=3)


def test_a_position_is_found_again_from_its_point():
    position = torch.linspace(0.0, 1.0, 301)
    found, distance = nearest(point_at(position))
    assert (found - position).abs().max() < 0.001
    assert distance.max() < 0.005


def test_the_distance_is_that_to_the_nearest_of_all_points_of_the_arm():
    xy = torch.tensor([[0.3, -1.1], [2.0, 2.0], [0.0, 0.0]])
    arm = point_at(torch.linspace(0.0, 1.0, 20001))
    assert torch.allclose(nearest(xy)[1], torch.cdist(xy, arm).amin(dim=1).double(), atol=1e-4)


def test_equal_pieces_of_the_arm_are_equally_long():
    lengths = point_at(torch.linspace(0.0, 1.0, 101)).diff(dim=0).norm(dim=1)
    assert float(lengths.std() / lengths.mean()) < 0.02


def test_labels_are_drawn_from_the_class_probabilities():
    data = data_set(30_000, seed=1)
    position, _ = nearest(data.xy)
    expected = class_probabilities(position)
    for piece in range(6):
        here = (position * 6).long() == piece
        share = data.labels[here].bincount(minlength=NUM_CLASSES) / here.sum()
        deviation = math.sqrt(0.25 / int(here.sum()))
        assert (share - expected[here].mean(dim=0)).abs().max() < 4 * deviation


def test_data_belong_to_their_seed():
    assert torch.equal(data_set(100, 5).xy, data_set(100, 5).xy)
    assert not torch.equal(data_set(100, 5).xy, data_set(100, 6).xy)

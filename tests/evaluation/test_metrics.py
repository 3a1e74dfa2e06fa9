"""CLIP score, zero-shot accuracy and retrieval, on features whose neighbours are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.metrics import (
    class_embeddings,
    clip_score,
    retrieval_recall,
    summarize_clip_score,
    zero_shot_accuracy,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clip_score_is_the_cosine_whatever_the_lengths() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [4.0, 0.0], [-1.0, -1.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([1.0, 0.0, -1.0])
    x, y = random(10, 7), random(10, 7, seed=1)
    angles = torch.stack([torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(x, y, strict=True)])
    assert clip_score(x, y) == pytest.approx(angles)
    with pytest.raises(ValueError, match="clip_score"):
        clip_score(x, y[:5])


def test_the_summary_has_every_convention() -> None:
    found = summarize_clip_score(torch.tensor([0.5, -0.3, 0.1]))
    assert found == {
        "mean_cosine": pytest.approx(0.1),
        "clip_score": pytest.approx(20.0),
        "clip_score_interval": None,
        "clipscore_hessel": pytest.approx(0.5),
        "num_samples": 3,
    }


def test_the_interval_of_the_score_covers_the_mean_as_often_as_it_says() -> None:
    # Of cosines uniform in [0, 0.6]: 30.
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        low, high = summarize_clip_score(0.6 * torch.rand(40, generator=generator))["clip_score_interval"]  # type: ignore[misc]
        hits += low <= 30 <= high
    assert 180 <= hits <= 198


def test_templates_are_averaged_after_normalisation() -> None:
    features = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]])
    assert class_embeddings(features)[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_zero_shot_accuracy_counts_the_nearest_class() -> None:
    classes = torch.eye(8)
    labels = torch.tensor([0, 0, 0, 1])
    images = torch.eye(8)[torch.tensor([0, 0, 0, 2])] + 0.1 * torch.eye(8)[torch.tensor([3, 3, 3, 1])]
    found = zero_shot_accuracy(5.0 * images, classes, labels)
    assert found == pytest.approx({"top1": 0.75, "per_class": 0.5, "top5": 1.0})


def test_zero_shot_accuracy_agrees_with_argmax_and_topk() -> None:
    images, classes = random(200, 16), torch.nn.functional.normalize(random(10, 16, seed=1), dim=-1)
    labels = torch.arange(200) % 10
    similarity = images @ classes.T
    found = zero_shot_accuracy(images, classes, labels)
    assert found["top1"] == pytest.approx(float((similarity.argmax(1) == labels).double().mean()))
    assert found["top5"] == pytest.approx(float((similarity.topk(5).indices == labels[:, None]).any(1).double().mean()))
    assert found["per_class"] == pytest.approx(found["top1"])  # classes of one size


def test_collapsed_features_do_not_score_by_luck() -> None:
    same, labels = torch.ones(4, 3), torch.tensor([0, 0, 0, 0])
    assert zero_shot_accuracy(same, torch.ones(2, 3) / 3**0.5, labels)["top1"] == 0
    recall = retrieval_recall(same, same, ["a", "b", "c", "d"], ks=(1,))
    assert recall == {"text_to_image@1": 0.0, "image_to_text@1": 0.0}


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, 1, -1], []])
def test_labels_that_do_not_fit_are_refused(labels: list[int]) -> None:
    images = torch.ones(len(labels) if len(labels) != 2 else 3, 4)
    with pytest.raises(ValueError, match="zero_shot_accuracy"):
        zero_shot_accuracy(images, torch.ones(2, 4), torch.tensor(labels, dtype=torch.int64))


def test_recall_agrees_with_sorting_when_captions_differ() -> None:
    images, texts = random(60, 8), random(60, 8, seed=1)
    texts = texts + 0.5 * images
    captions = [f"caption {i}" for i in range(60)]
    found = retrieval_recall(images, texts, captions)
    similarity = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    for name, matrix in (("text_to_image", similarity), ("image_to_text", similarity.T)):
        place = matrix.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            hits = (place[:, :k] == torch.arange(60)[:, None]).any(1)
            assert found[f"{name}@{k}"] == pytest.approx(float(hits.double().mean()))
    assert 0 < found["text_to_image@1"] < found["text_to_image@5"] < found["text_to_image@10"] < 1


def test_equal_captions_are_one_caption() -> None:
    texts = torch.eye(3)[[0, 0, 1, 2]]
    images = torch.eye(3)[[0, 1, 1, 2]] + 0.01
    captions = ["a", "a", "b", "c"]
    found = retrieval_recall(images, texts, captions, ks=(1, 2))
    # "a" finds its first image; image 1, of caption "a" too, lies at "b" and finds "a" second at best.
    assert found["text_to_image@1"] == pytest.approx(2 / 3)  # for "b", image 1 ties with image 2 and comes first
    assert found["text_to_image@2"] == 1
    assert found["image_to_text@1"] == pytest.approx(3 / 4)


def test_recall_does_not_depend_on_how_queries_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = random(50, 6), random(50, 6, seed=1)
    captions = [str(i % 40) for i in range(50)]
    whole = retrieval_recall(images, texts, captions)
    monkeypatch.setattr("ldm_cli.evaluation.metrics._CHUNK", 7)
    assert retrieval_recall(images, texts, captions) == whole


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images, 2 texts, 1 captions"):
        retrieval_recall(torch.ones(2, 3), torch.ones(2, 3), ["a"])

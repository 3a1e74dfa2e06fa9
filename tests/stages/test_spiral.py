"""The lesson's sentences are true, and its page stands alone."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from ldm_cli.errors import OutputError
from ldm_cli.lesson.network import DIFFUSION, train
from ldm_cli.lesson.spiral import data_set
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import spiral

FIGURES = ("forward", "field", "directions", "ddpm", "ddpm-without-noise", "ddim", "guidance")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A short lesson: (result, folder)."""
    out = tmp_path_factory.mktemp("lesson") / "spiral"
    return spiral.run(out, 0, 700, 3.0, SilentReporter()), out


@pytest.mark.exhaustive
def test_ddpm_draws_the_data_and_without_its_noise_everything_collapses_into_the_middle(lesson):
    methods = lesson[0]["methods"]
    assert methods["ddpm"]["distance_to_spiral"] < 0.15
    assert methods["ddpm"]["arm_covered"] >= 0.95
    assert methods["ddpm"]["energy_distance"] < 0.02
    assert methods["quiet"]["near_middle"] > 0.99
    assert methods["quiet"]["spread"] < 0.1 * methods["data"]["spread"]
    assert methods["quiet"]["energy_distance"] > 20 * methods["ddpm"]["energy_distance"]


@pytest.mark.exhaustive
def test_ddim_draws_the_data_from_the_same_field(lesson):
    ddim = lesson[0]["methods"]["ddim"]
    assert ddim["distance_to_spiral"] < 0.2
    assert ddim["arm_covered"] >= 0.95
    assert ddim["energy_distance"] < 0.02


@pytest.mark.exhaustive
def test_arrows_lead_to_the_mean_in_strong_noise_and_to_the_data_in_weak_noise(lesson):
    field = lesson[0]["field"]
    strong, weak = field[f"t={DIFFUSION.num_train_timesteps - 1}"], field["t=5"]
    assert min(strong["learned_to_best"], strong["best_to_mean"]) > 0.99
    assert weak["best_to_nearest"] > 0.85 > 0.3 > weak["best_to_mean"]
    assert weak["learned_to_best"] > 0.6


@pytest.mark.exhaustive
def test_guidance_draws_classes_apart(lesson):
    guidance = lesson[0]["guidance"]
    data, plain, guided = guidance["data"], guidance["scale_1"], guidance["scale_3"]
    assert plain["in_class"] == pytest.approx(data["in_class"], abs=0.06)
    assert guided["in_class"] > plain["in_class"] + 0.08
    assert guided["class_spread"] < 0.8 * plain["class_spread"]


@pytest.mark.exhaustive
def test_figures_are_pictures_and_facts_are_kept(lesson):
    result, out = lesson
    for name in FIGURES:
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.getcolors(1 << 24)) > 20
    kept = json.loads((out / "spiral.json").read_text())
    assert kept == {name: value for name, value in result.items() if name != "files"}


class Page(HTMLParser):
    """Attributes that load something, texts of figure captions, and ids."""

    def __init__(self):
        super().__init__()
        self.loads, self.ids, self.captions, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [v for k, v in given.items() if k in ("src", "href", "data", "srcset", "poster")]
        self.ids += [given["id"]] if "id" in given else []
        self.open.append((tag, given.get("lang")))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if data.strip() and any(tag == "figcaption" for tag, _ in self.open):
            self.captions.append((self.open[-1][1], data))


@pytest.mark.exhaustive
def test_the_page_loads_nothing_and_says_each_thing_in_english_and_chinese(lesson):
    text = (lesson[1] / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loads == ["data:,"]
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not re.search(r"@[A-Z]+@", text)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.captions) == 2 * len(FIGURES)
    for (english, sentence), (chinese, satz) in zip(page.captions[::2], page.captions[1::2], strict=True):
        assert (english, chinese) == (None, "zh")
        assert sentence.isascii()
        assert re.search(r"[\u4e00-\u9fff]", satz)
    assert len(text) < 2_000_000


@pytest.mark.exhaustive
def test_labels_stay_inside_of_their_figure_in_the_large_letters_of_narrow_pages(lesson):
    text = (lesson[1] / "index.html").read_text(encoding="utf-8")
    (size,) = re.findall(r"svg text\{font-size:(\d+)px!important\}", text)
    labels = [
        (float(x), int(width), label)
        for width, drawing in re.findall(r'<svg viewBox="0 0 (\d+) .*?"(.*?)</svg>', text, re.DOTALL)
        for x, label in re.findall(r'<text style="[^"]*"[^>]* x="([\d.]+)"[^>]*>(.*?)<', drawing)
        if "arrow" in label
    ]
    assert len(labels) == 3
    for x, width, label in labels:
        assert x + 0.6 * int(size) * len(label) < width, label


def test_the_same_seed_trains_the_same_network_to_the_last_bit():
    data = data_set(300, 1)
    first, again, other = (train(data, 3, seed, lambda done, loss: None) for seed in (1, 1, 2))
    for name, weights in first.network.state_dict().items():
        assert torch.equal(weights, again.network.state_dict()[name])
    assert first.losses == again.losses != other.losses


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    train(data_set(300, 1), 1, 0, lambda done, loss: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_earlier_lesson_is_not_replaced_unasked(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        spiral.run(tmp_path, 0, 1, 3.0, SilentReporter())
    assert (tmp_path / "index.html").read_text() == "mine"

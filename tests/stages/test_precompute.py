"""`ldm precompute`: training from the cache is training, and a cache that does not fit is named."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from ldm_cli.core.cpu.group_norm import TunedGroupNorm
from ldm_cli.core.cpu.linear import TunedLinear
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip_text import CLIPTextModel
from ldm_cli.data import cache_writer
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import MANIFEST
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.scenes import write_scenes
from ldm_cli.errors import DataError, InputNotFoundError, LdmError, OutputError, Preempted, RecipeError, StuckError
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import precompute
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.training.failures import MAX_ATTEMPTS
from tests.data.tars import png, write_tar

from ..faults.runs import assert_same_run, metrics
from ..training.forked import ForkedRanks
from .tiny import cached, clip_recipe, lose_after, trained, unet_recipe, vae_recipe

Parts = tuple[Path, Path, Path]
Recipes = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def parts(scenes: Path, clip_run: Path, vae_run: Path) -> Parts:
    return scenes, clip_run / "model", vae_run / "model"


@pytest.fixture(scope="module")
def made_cache(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `unet_recipe(*parts)`, to be copied."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    cached(unet_recipe(*parts), folder)
    return folder


@pytest.fixture
def with_cache(parts: Parts, made_cache: Path, tmp_path: Path) -> Recipes:
    """`unet_recipe(*parts, **train)` with its cache in a folder of the test."""

    def recipe(**train: Any) -> dict[str, Any]:
        shutil.copytree(made_cache, tmp_path / "cache")
        return unet_recipe(*parts, **train) | {"cache": str(tmp_path / "cache")}

    return recipe


def assert_a_cache_changes_nothing(recipe: Mapping[str, Any], folder: Path) -> None:
    """Train with a cache and without one: the losses of all steps and the weights are the same."""
    steps = recipe["train"]["steps"]
    trained(recipe, folder / "plain")
    trained(cached(recipe, folder / "cache"), folder / "cached")
    plain, from_cache = metrics(folder / "plain"), metrics(folder / "cached")
    assert len(plain) == steps
    for one, other in zip(plain, from_cache, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert_same_run(folder / "plain", folder / "cached", steps)


def result_of(recipe: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    chosen = RunOptions(device="cpu", **options)
    return precompute.run(TrainUnetRecipe.from_mapping(recipe), chosen, SilentReporter())


def files(folder: Path) -> dict[str, int]:
    """Name → inode and time of every file with samples."""
    return {path.name: hash((path.stat().st_ino, path.stat().st_mtime_ns)) for path in folder.glob("*.tar")}


def without_encoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts what the encoders are asked for."""
    calls: list[str] = []
    for kind, name in ((AutoencoderKL, "posterior"), (CLIPTextModel, "forward")):
        original = getattr(kind, name)

        def counted(self: Any, *args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)
    return calls


@pytest.mark.parametrize("flip", [0.5, pytest.param(1.0, marks=pytest.mark.exhaustive)])
def test_training_from_a_cache_gives_the_same_weights_and_losses(parts: Parts, tmp_path: Path, flip: float) -> None:
    recipe = unet_recipe(*parts, steps=5, ema_decay=0.9, log_every=1, save_every=5, micro_batch=4)
    recipe["data"]["flip_probability"] = flip
    assert_a_cache_changes_nothing(recipe, tmp_path)


def test_masks_out_of_a_cache_are_those_of_training(parts: Parts, tmp_path: Path) -> None:
    members = []
    for number in range(12):
        mask = Image.new("L", (40, 32))
        mask.paste(255, (number, 3, 20 + number, 21))
        stream = io.BytesIO()
        mask.save(stream, "PNG")
        members += [(f"{number}.png", png((20 * number, 90, 9), (40, 32))), (f"{number}.txt", b"a red circle")]
        members += [(f"{number}.mask.png", stream.getvalue())] if number % 3 else []
    write_tar(tmp_path / "masked.tar", members)
    recipe = unet_recipe(*parts, steps=3, log_every=1, save_every=3)
    recipe["data"] |= {"shards": str(tmp_path / "masked.tar"), "mask": "mask.png", "flip_probability": 0.5}
    assert_a_cache_changes_nothing(recipe, tmp_path)
    unmasked = trained({**recipe, "data": {**recipe["data"], "mask": None}}, tmp_path / "unmasked")
    assert metrics(tmp_path / "unmasked")[0]["loss"] > metrics(tmp_path / "cached")[0]["loss"]
    assert unmasked["step"] == 3


def test_no_encoder_runs_in_a_step_from_a_cache(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = unet_recipe(*parts, steps=2)
    recipe["data"]["val_shards"] = None
    recipe = cached(recipe, tmp_path / "cache")
    calls = without_encoders(monkeypatch)
    trained(recipe, tmp_path / "cached")
    assert calls == []
    trained({**recipe, "cache": None}, tmp_path / "plain")
    assert {"posterior", "forward"} == set(calls)


def test_codec_and_encoder_are_tuned_where_they_encode(parts: Parts) -> None:
    encoder = BatchEncoder(TrainUnetRecipe.from_mapping(unet_recipe(*parts)), torch.device("cpu"), pytest.fail)
    kinds = {type(module) for model in (encoder.codec, encoder.encoder.model) for module in model.modules()}
    assert {TunedLinear, TunedGroupNorm} <= kinds


def test_a_run_may_be_continued_with_a_cache_and_without(parts: Parts, with_cache: Recipes, tmp_path: Path) -> None:
    recipe = unet_recipe(*parts, steps=5, save_every=2)
    trained(recipe, tmp_path / "whole")
    lose_after(2, recipe, tmp_path / "broken")
    lose_after(4, with_cache(steps=5, save_every=2), tmp_path / "broken")
    trained(recipe, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 5)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_half_precision_takes_less_room_and_rounds_the_loss(parts: Parts, tmp_path: Path, dtype: str) -> None:
    recipe = unet_recipe(*parts, steps=4, log_every=1)
    trained(recipe, tmp_path / "plain")
    half = cached(recipe, tmp_path / "half", dtype)
    full = cached(recipe, tmp_path / "full")
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.tar")) for name in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    trained(half, tmp_path / "run")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    with pytest.raises(LdmError, match="the fingerprint of cache"):
        trained(full, tmp_path / "run", resume="auto")


def test_a_second_life_does_nothing_and_an_interrupted_one_is_finished(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**unet_recipe(*parts), "cache": str(tmp_path / "cache")}
    write = cache_writer.write_shard
    num_written = 0

    def interrupted(path: Path, samples: Any) -> None:
        nonlocal num_written
        if num_written == 2:
            next(iter(samples))
            raise KeyboardInterrupt
        num_written += 1
        write(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            result_of(recipe)
    with pytest.raises(DataError, match="not complete"):
        trained(recipe, tmp_path / "run")
    first = files(tmp_path / "cache")
    assert len(first) == 2
    assert result_of(recipe)["encoded"] == 14  # of 64 in shards of 25, 25 and 14
    finished = files(tmp_path / "cache")
    assert first.items() <= finished.items()
    assert len(finished) == 4
    again = result_of(recipe)
    assert (again["encoded"], again["removed_files"]) == (0, 0)
    assert files(tmp_path / "cache") == finished
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_the_time_limit_stops_with_what_is_written(parts: Parts, tmp_path: Path) -> None:
    recipe = {**unet_recipe(*parts), "cache": str(tmp_path / "cache")}
    with pytest.raises(Preempted):
        result_of(recipe, max_time=1e-9)
    assert files(tmp_path / "cache") == {}
    assert result_of(recipe)["encoded"] == 64


def test_a_time_limit_that_leaves_room_for_no_file_ends_in_a_word_not_in_a_loop(parts: Parts, tmp_path: Path) -> None:
    recipe = {**unet_recipe(*parts), "cache": str(tmp_path / "cache")}
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Preempted, match="no file was finished in it"):
            result_of(recipe, max_time=1e-9)
    with pytest.raises(StuckError, match=r"5 times in file 1: .*do not requeue"):
        result_of(recipe, max_time=1e-9)
    (tmp_path / "cache/failures.jsonl").unlink()
    result_of(recipe)
    assert not (tmp_path / "cache/failures.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 48}, r"data\.image_size was 32 and is 48"),
        ({"crop": "squash"}, r'data\.crop was "center" and is "squash"'),
        ({"flip_probability": 0.5}, r"data\.flip_probability"),
        ({"background": [0, 0, 0]}, r"data\.background"),
    ],
)
def test_another_preprocessing_is_named(
    with_cache: Recipes, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    recipe = with_cache(steps=1)
    recipe["data"] = {**recipe["data"], **change}
    with pytest.raises(DataError, match=message):
        trained(recipe, tmp_path / "run")
    with pytest.raises(OutputError, match=message):
        result_of(recipe)
    assert not (tmp_path / "run").exists()


def test_other_models_are_named_and_replaced_only_on_demand(parts: Parts, with_cache: Recipes, tmp_path: Path) -> None:
    scenes, _, _ = parts
    trained(vae_recipe(scenes, steps=1) | {"seed": 5}, tmp_path / "vae")
    trained(clip_recipe(scenes, steps=1) | {"seed": 5}, tmp_path / "clip")
    recipe = with_cache(steps=1)
    before = files(tmp_path / "cache")
    for field, folder in (("vae", tmp_path / "vae/model"), ("text_encoder", tmp_path / "clip/model")):
        other = {**recipe, field: str(folder)}
        with pytest.raises(DataError, match=f"stale: {field} was"):
            trained(other, tmp_path / "run")
        with pytest.raises(OutputError, match=f"{field} was .*--overwrite"):
            result_of(other)
    assert files(tmp_path / "cache") == before
    other = {**recipe, "vae": str(tmp_path / "vae/model")}
    assert result_of(other, overwrite=True)["removed_files"] == 3
    after = files(tmp_path / "cache")
    assert {name for name in before if name in after} == {name for name in before if name.startswith("text-")}
    trained(other, tmp_path / "run")


def test_a_measured_scale_leaves_the_cache_as_it_is(parts: Parts, with_cache: Recipes, tmp_path: Path) -> None:
    """The scale is applied to what the cache holds."""
    _, _, vae = parts
    recipe = with_cache(steps=1)
    copy = tmp_path / "vae"
    copy.mkdir()
    for file in vae.glob("*.safetensors"):
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((vae / "config.json").read_text()) | {"scaling_factor": 3.0}
    (copy / "config.json").write_text(json.dumps(config))
    trained({**recipe, "vae": str(copy)}, tmp_path / "run")
    (copy / "config.json").write_text(json.dumps(config | {"norm_num_groups": 2}))
    with pytest.raises(DataError, match="vae was"):
        trained({**recipe, "vae": str(copy)}, tmp_path / "other")


def test_changed_shards_are_named_and_only_they_are_made_anew(parts: Parts, tmp_path: Path) -> None:
    _, clip, vae = parts
    data = tmp_path / "data"
    write_scenes(data, 24, 32, 0, SilentReporter(), val_samples=4, shard_samples=8)
    recipe = cached(unet_recipe(data, clip, vae, steps=1, batch_size=4), tmp_path / "cache")
    before = files(tmp_path / "cache")
    shard = data / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT") + 8
    content[place] ^= 1  # the same size, the same headers
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"stale: shards are new or have changed: '.*train-000001\.tar';"):
        trained(recipe, tmp_path / "run")
    assert result_of(recipe)["encoded"] == 8
    after = files(tmp_path / "cache")
    assert len(before.items() & after.items()) == len(before) - 1
    assert len(after) == len(before)


def test_shards_may_be_touched_and_moved(parts: Parts, tmp_path: Path) -> None:
    _, clip, vae = parts
    data = tmp_path / "data"
    write_scenes(data, 16, 32, 0, SilentReporter(), val_samples=4, shard_samples=8)
    recipe = cached(unet_recipe(data, clip, vae, steps=1, batch_size=4), tmp_path / "cache")
    (data / "train-000000.tar").touch()
    data.rename(tmp_path / "moved")
    recipe["data"] |= {"shards": str(tmp_path / "moved/train-*.tar"), "val_shards": None}
    trained(recipe, tmp_path / "run")


def bit_flipped(file: Path) -> None:
    """A bit in the data of a member in the middle: headers and index stay as they are."""
    content = bytearray(file.read_bytes())
    content[content.index(b"data_offsets", len(content) // 2) + 300] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def made_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [bit_flipped, cut, made_a_fifo, Path.unlink])
def test_exactly_the_damaged_files_of_a_cache_are_made_anew(
    with_cache: Recipes, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    recipe = with_cache(steps=4)
    before, content = files(tmp_path / "cache"), (tmp_path / "cache" / MANIFEST).read_bytes()
    for kind in ("latents", "text"):
        damaged = min((tmp_path / "cache").glob(f"{kind}-*.tar"))
        damage(damaged)
        with pytest.raises(DataError if damage in (bit_flipped, cut) else InputNotFoundError, match=damaged.name):
            trained(recipe, tmp_path / "run")
        reporter = SilentReporter()
        cached(recipe, tmp_path / "cache", reporter=reporter)
        named = [message for message in reporter.messages if "is damaged" in message]
        assert [damaged.name in message for message in named] == [True] * (damage is not Path.unlink)
        after = files(tmp_path / "cache")
        assert {name for name in before if after[name] != before[name]} == {damaged.name}
        assert (tmp_path / "cache" / MANIFEST).read_bytes() == content
        before = after
    trained(recipe, tmp_path / "run")


def test_two_files_of_a_cache_are_not_taken_for_one_another(parts: Parts, tmp_path: Path) -> None:
    """Shards with the same keys: each file of moments would fit the other's shard."""
    scenes, clip, vae = parts
    for number in range(2):
        pictures = [(f"{n}.png", png((20 * n, 99 * number, 9), (32, 32))) for n in range(8)]
        write_tar(tmp_path / f"{number}.tar", [*pictures, *((f"{n}.txt", b"a red circle") for n in range(8))])
    recipe = unet_recipe(scenes, clip, vae, steps=2, batch_size=8)
    recipe["data"] |= {"shards": str(tmp_path / "?.tar"), "val_shards": None}
    recipe = cached(recipe, tmp_path / "cache")
    one, two = (tmp_path / "cache").glob("latents-*.tar")
    one.rename(tmp_path / "third")
    two.rename(one)
    (tmp_path / "third").rename(two)
    with pytest.raises(DataError, match="damaged: its content is not that of its name; run `ldm precompute`"):
        trained(recipe, tmp_path / "run")


def test_a_file_is_hashed_once_by_a_process(
    with_cache: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_cache(steps=12)
    hashed: list[str] = []

    def noted(file: Path) -> bool:
        hashed.append(file.name)
        return True

    monkeypatch.setattr("ldm_cli.data.latent_cache.is_whole", noted)
    trained(recipe, tmp_path / "run")
    assert sorted(hashed) == sorted(files(tmp_path / "cache"))


@pytest.mark.parametrize(
    "content",
    [b"", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in (b"[]", bytes(400), b"\xff\xfe")), None],
)
def test_a_damaged_manifest_is_made_again_from_the_files(
    with_cache: Recipes, tmp_path: Path, content: bytes | None
) -> None:
    recipe = with_cache(steps=1)
    manifest, before = tmp_path / "cache" / MANIFEST, files(tmp_path / "cache")
    sound = manifest.read_bytes()
    manifest.write_bytes(sound.replace(b"train-000001", b"train-000002", 1) if content is None else content)
    with pytest.raises(DataError, match=r"cache\.json' is damaged.*run `ldm precompute`"):
        trained(recipe, tmp_path / "run")
    assert result_of(recipe)["encoded"] == 0
    assert (manifest.read_bytes(), files(tmp_path / "cache")) == (sound, before)
    trained(recipe, tmp_path / "run")


def test_bad_pictures_and_captions_are_replaced_as_without_a_cache(parts: Parts, tmp_path: Path) -> None:
    _, clip, vae = parts
    members = []
    for number in range(24):
        picture = b"broken" if number % 6 == 1 else png((number * 9, 3, 200), (40, 33))
        members += [(f"{number:03d}.png", picture), (f"{number:03d}.json", _captions(number))]
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data/train-0.tar", members[:30])
    write_tar(tmp_path / "data/train-1.tar", members[30:])
    recipe = unet_recipe(tmp_path / "data", clip, vae, steps=6, batch_size=4, log_every=1, save_every=6)
    recipe["data"] |= {"val_shards": None, "caption": "json:caption", "max_bad_fraction": 1.0, "flip_probability": 0.5}
    trained(recipe, tmp_path / "plain")
    trained(cached(recipe, tmp_path / "cache"), tmp_path / "cached")
    assert_same_run(tmp_path / "plain", tmp_path / "cached", 6)
    bad = [(tmp_path / name / "bad_samples.jsonl").read_text() for name in ("plain", "cached")]
    assert bad[0] == bad[1]
    assert "not an image" in bad[0]
    assert "missing caption" in bad[0]


def _captions(number: int) -> bytes:
    texts = [] if number % 8 == 2 else [f"a {word} thing {number % 4}" for word in ("red", "round", "small")]
    return json.dumps({"caption": texts}).encode()


@pytest.mark.parametrize("change", [{"crop": "random"}, {"aspect_buckets": {"step": 8}}])
def test_pictures_without_one_fixed_square_are_refused_before_anything_is_written(
    change: dict[str, Any], parts: Parts, tmp_path: Path
) -> None:
    recipe = unet_recipe(*parts) | {"cache": str(tmp_path / "cache")}
    recipe["data"] |= change
    for act in (lambda: result_of(recipe), lambda: trained(recipe, tmp_path / "run")):
        with pytest.raises(RecipeError, match=rf"data\.{next(iter(change))}.* cannot be cached"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_stream_has_no_cache(parts: Parts, tmp_path: Path) -> None:
    recipe = unet_recipe(*parts) | {"cache": str(tmp_path / "cache")}
    recipe["data"]["stream"] = True
    with pytest.raises(RecipeError, match=r"data\.stream=true is for training only"):
        result_of(recipe)
    with pytest.raises(RecipeError, match=r"a cache cannot be used with data\.stream"):
        trained(recipe, tmp_path / "run")


def test_a_cache_that_is_not_there_is_named(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"no cache in '.*'.*ldm precompute"):
        trained(unet_recipe(*parts) | {"cache": str(tmp_path / "cache")}, tmp_path / "run")


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    def work(_: int) -> int:
        with pytest.raises(OutputError, match="is in use"), cache_writer.locked(tmp_path):
            pass
        return 0

    with cache_writer.locked(tmp_path), ForkedRanks(work, tmp_path, 1) as job:
        assert job.wait() == [0], job.words()


def test_webdataset_and_safetensors_read_the_files(parts: Parts, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    cached(unet_recipe(*parts), tmp_path / "cache", "bf16")
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    latents = [str(tmp_path / "cache" / shard["file"]) for shard in manifest["shards"]]
    samples = list(webdataset.WebDataset(latents, shardshuffle=False))
    assert len(samples) == 64
    tensors = load(samples[0]["moments.safetensors"])
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes == {"mean": (3, 16, 16), "logvar": (3, 16, 16), "sizes": (6,)}
    assert tensors["mean"].dtype == torch.bfloat16
    (text,) = [str(tmp_path / "cache" / name) for name in manifest["text_files"]]
    captions = [sample["txt"].decode() for sample in webdataset.WebDataset(text, shardshuffle=False)]
    assert len(set(captions)) == len(captions) > 10
    assert captions[0] == ""


def test_workers_and_ranks_change_nothing(parts: Parts, tmp_path: Path) -> None:
    recipe = unet_recipe(*parts)
    recipe["data"] |= {"num_workers": 2, "flip_probability": 0.5}
    cached(recipe, tmp_path / "two")
    recipe["data"]["num_workers"] = 0
    wanted = TrainUnetRecipe.from_mapping(cached(recipe, tmp_path / "none"))
    wanted = with_precision(wanted, RunOptions(device="cpu"))
    for path in (tmp_path / "two").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "none" / path.name).read_bytes()
    shards = open_shards(wanted.data.shards, wanted.data, SilentReporter())
    cache = LatentCache(tmp_path / "none", shards, cache_key(wanted), SilentReporter())

    def batch(**options: Any) -> Batch:
        (only,) = Loader(shards, wanted.data, seed=0, batch_size=8, **options).batches(9, 10)
        return only

    whole, plain = batch(cache=cache), batch()
    halves = [batch(cache=cache, rank=rank, world_size=2) for rank in (0, 1)]
    assert (whole.keys, whole.captions, len(whole.images[0].flatten())) == (plain.keys, plain.captions, 0)
    assert torch.equal(whole.position, plain.position)
    assert torch.equal(whole.sizes, plain.sizes)  # type: ignore[arg-type]
    for kind in ("moments", "condition"):
        tensors = getattr(whole, kind)
        assert tensors.keys() == ({"mean", "logvar"} if kind == "moments" else {"tokens"})
        for name, tensor in tensors.items():
            assert torch.equal(torch.cat([getattr(half, kind)[name] for half in halves]), tensor)
    encoder = BatchEncoder(wanted, torch.device("cpu"), list)
    moments, condition = encoder(encoder.prepare(plain))
    torch.testing.assert_close(whole.moments, moments)
    torch.testing.assert_close(whole.condition, condition.tensors)


def test_the_plan_names_the_room_that_the_files_take(parts: Parts, tmp_path: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping(unet_recipe(*parts) | {"cache": str(tmp_path / "cache")})
    expected = precompute.dry_run(recipe, RunOptions(), SilentReporter())
    assert not (tmp_path / "cache").exists()
    precompute.run(recipe, RunOptions(device="cpu"), SilentReporter())
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("latents-*.tar"))
    assert expected["bytes_of_latents"] == pytest.approx(written, rel=0.2)


def test_two_ranks_write_the_files_that_one_writes(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "_CAPTIONS_PER_FILE", 20)
    recipe = unet_recipe(*parts)
    cached(recipe, tmp_path / "one")
    with ForkedRanks(lambda rank: 0 * len(cached(recipe, tmp_path / "two")), tmp_path) as job:
        assert job.wait() == [0, 0], job.words()
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len([name for name in one if name.endswith(".tar")]) > 4
    assert one == two

"""Models by name: cold, warm, offline, pinned, refused, cut and without room."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, StorageError, UnavailableError
from ldm_cli.formats.hub import HubName, fetch, hub_name, hub_source, recorded
from ldm_cli.formats.weight_files import weight_files
from ldm_cli.reporting import SilentReporter
from tests.hub_server import Hub, ask_only, served

NAME = HubName("org/tiny")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It has `org/tiny`, a pipeline of two networks."""
    write_pipeline(tmp_path / "v1", b"one")
    with served(Hub({NAME.repo: {"main": tmp_path / "v1"}})) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        yield hub


def write_pipeline(folder: Path, content: bytes) -> None:
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for name in kinds:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
        (folder / name / WEIGHTS).write_bytes(1000 * (content + name.encode()))
        (folder / name / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "model_index.json").write_text(json.dumps(kinds))


def offline(patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def got(name: HubName = NAME, *components: str, variant: str | None = None) -> Path:
    return fetch(name, components, variant, SilentReporter())


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def downloads(hub: Hub) -> list[str]:
    """The files that were sent since the last call, in order."""
    sent = [request.split("/", 5)[5] for request in hub.requests if request.startswith("GET /org")]
    hub.requests.clear()
    return sent


def test_a_cold_fetch_brings_what_is_needed_and_a_warm_one_asks_once(hub: Hub, tmp_path: Path) -> None:
    folder = got()
    wanted = {name: content for name, content in files_in(tmp_path / "v1").items() if not name.endswith(".bin")}
    assert files_in(folder) == wanted
    assert sorted(downloads(hub)) == sorted(wanted)
    assert got() == folder
    assert hub.requests == ["GET /api/models/org/tiny/revision/main"]


def test_offline_a_complete_model_opens_without_any_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = got()
    hub.requests.clear()
    offline(monkeypatch)
    reporter = SilentReporter()
    assert fetch(NAME, (), None, reporter) == folder
    assert got(HubName(NAME.repo, folder.name)) == folder
    assert reporter.messages == ["'org/tiny' is taken from the cache: HF_HUB_OFFLINE is set"]
    assert hub.requests == []


def test_a_hub_that_is_gone_is_replaced_by_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path / "v1", b"one")
    with served(Hub({NAME.repo: {"main": tmp_path / "v1"}})) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        folder = got()
    reporter = SilentReporter()
    assert fetch(NAME, (), None, reporter) == folder
    assert reporter.messages[0].startswith("'org/tiny' is taken from the cache: the hub cannot be reached (")
    with pytest.raises(UnavailableError, match=r"cannot get 'org/other' from the hub: the hub cannot be reached \("):
        got(HubName("org/other"))


def test_offline_what_the_cache_lacks_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    got(NAME, "vae")
    offline(monkeypatch)
    assert got(NAME, "vae").is_dir()
    with pytest.raises(InputNotFoundError, match="'org/tiny' has no files of 'unet'"):
        got()
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE is set, and neither the cache nor a folder of that"):
        got(HubName("org/other"))


def test_only_the_components_asked_for_are_downloaded(hub: Hub) -> None:
    folder = got(NAME, "vae")
    assert sorted(downloads(hub)) == ["model_index.json", "vae/config.json", f"vae/{WEIGHTS}"]
    assert not (folder / "unet").exists()
    with pytest.raises(InputNotFoundError, match="'org/tiny' has no component 'text_encoder': it has unet, vae"):
        got(NAME, "text_encoder")


def test_a_revision_stays_and_a_branch_moves(hub: Hub, tmp_path: Path) -> None:
    first = got()
    write_pipeline(tmp_path / "v2", b"two")
    hub.models[NAME.repo] = {"old": tmp_path / "v1", "main": tmp_path / "v2"}
    second = got()
    assert files_in(second)[f"vae/{WEIGHTS}"] == (tmp_path / "v2/vae" / WEIGHTS).read_bytes()
    assert second != first
    assert got(HubName(NAME.repo, first.name)) == got(HubName(NAME.repo, "old")) == first
    with pytest.raises(InputNotFoundError, match="'org/tiny' has no revision 'v9'"):
        got(HubName(NAME.repo, "v9"))


def test_a_variant_is_read_although_full_precision_is_in_the_cache_too(hub: Hub, tmp_path: Path) -> None:
    half = "diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "v1/unet" / half).write_bytes(b"half")
    full = got()
    downloads(hub)
    folder = got(variant="fp16")
    assert downloads(hub) == [f"unet/{half}"]
    assert [file.name for file in weight_files(folder / "unet")] == [half]
    assert [file.name for file in weight_files(folder / "vae")] == [WEIGHTS]
    assert [file.name for file in weight_files(full / "unet")] == [WEIGHTS]
    assert recorded(folder) == recorded(full)
    assert files_in(got(variant="fp16")) == files_in(folder)
    with pytest.raises(InputNotFoundError, match="no weights of the variant 'bf16'"):
        got(variant="bf16")


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (404, "RepoNotFound", InputNotFoundError, "no model 'org/tiny': .* keeps it private; .*HF_TOKEN"),
        (401, "RepoNotFound", InputNotFoundError, "no model 'org/tiny'"),
        (401, "", UnavailableError, "it answered: .*401.*; check HF_TOKEN"),
        (403, "GatedRepo", UnavailableError, "its owner grants access on request; ask for access .* set HF_TOKEN"),
        (403, "", UnavailableError, "it answered: .*403.*; check HF_TOKEN"),
        (503, "", UnavailableError, "the hub cannot be reached .*503"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: Hub, status: int, code: str, kind: type[LdmError], words: str
) -> None:
    hub.refused[NAME.repo] = (status, code)
    with pytest.raises(kind, match=words) as caught:
        got()
    assert "\n" not in str(caught.value)


def test_a_gated_model_may_show_its_list_of_files_but_none_of_them(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = hub.answer
    gated = lambda method, path, headers: (  # noqa: E731
        answer(method, path, headers) if path.startswith("/api") else hub.error(403, "GatedRepo")
    )
    monkeypatch.setattr(hub, "answer", gated)
    with pytest.raises(UnavailableError, match="its owner grants access on request"):
        got()


def test_pickles_are_refused_and_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "v1/unet" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors weights in 'org/tiny/unet': 'pytorch_model\.bin' is a"):
        got()
    assert downloads(hub) == ["model_index.json"]


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut[WEIGHTS] = [1024]
    folder = got(NAME, "unet")
    assert any(request.endswith(f"/unet/{WEIGHTS} bytes=1024-") for request in hub.requests)
    assert (folder / "unet" / WEIGHTS).read_bytes() == (tmp_path / "v1/unet" / WEIGHTS).read_bytes()


def test_after_a_download_that_failed_the_next_call_brings_the_missing_files_alone(hub: Hub, tmp_path: Path) -> None:
    hub.cut[WEIGHTS] = [7000] + 6 * [0]  # unet's weights arrive in full
    with pytest.raises(UnavailableError, match="cannot get 'org/tiny' from the hub"):
        got()
    downloads(hub)
    folder = got()
    assert downloads(hub) == [f"vae/{WEIGHTS}"]
    assert (folder / "vae" / WEIGHTS).read_bytes() == (tmp_path / "v1/vae" / WEIGHTS).read_bytes()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_disk_without_room_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [2000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, room[0]))
    with pytest.raises(StorageError, match=r"no room for 'org/tiny' .* set HF_HOME to another disk"):
        got()
    assert downloads(hub) == ["model_index.json"]
    room[0] = 10**6
    folder = got()
    room[0] = 0
    assert got() == folder


def test_a_disk_that_fills_up_meanwhile_leaves_no_half_file(hub: Hub, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(StorageError, match=r"File too large .* run the same command again"):
            got()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert (got() / "unet" / WEIGHTS).stat().st_size == 7000


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    with pytest.raises(LdmError, match="cannot write") as caught:
        got()
    assert caught.value.code == 73


def test_a_name_means_the_hub_unless_a_path_of_that_name_or_its_folder_exists(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reporter = SilentReporter()
    assert hub_name("org/tiny", reporter) == NAME
    assert hub_name("org/tiny@v1", reporter) == HubName("org/tiny", "v1")
    paths = ("runs/demo", "data/tokenizer", "tiny", "a/b/c", "/org/tiny", "./org/tiny", "../tiny", "org/tiny@")
    for path in (*paths, "models/x.safetensors", "x.safetensors/vae", "models/x.ckpt"):
        assert hub_name(path, reporter) is None
    assert reporter.messages == []
    Path("file").touch()
    assert (hub_name("file/unet", reporter), reporter.messages) == (None, [])
    Path("org").mkdir()
    assert hub_name("org/tiny", reporter) is None
    assert hub_name("org/tiny@main", reporter) == NAME
    assert reporter.messages == ["'org/tiny' means a path, as there is a folder 'org'; on the hub: 'org/tiny@main'"]
    Path("org/tiny").mkdir()
    assert hub_name("org/tiny", reporter) is None
    assert reporter.messages[1:] == []
    got()
    assert hub_name("org/tiny", reporter) is None
    assert reporter.messages[1:] == ["'org/tiny' is the folder of that name; the model of the hub is 'org/tiny@main'"]


def test_a_folder_in_the_cache_is_recorded_by_name_and_commit(hub: Hub, tmp_path: Path) -> None:
    folder = got()
    assert recorded(folder) == recorded(folder / "vae") == f"org/tiny@{hub.commit('org/tiny', 'main')}"
    assert hub_source(folder) == HubName.parse(recorded(folder))
    assert (recorded(tmp_path), hub_source(tmp_path)) == (str(tmp_path), None)

"""Which folder a path means, and which family opens it."""

import pytest

from ldm_cli.errors import InputNotFoundError
from ldm_cli.families.open_family import resolve_model


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


def test_model_of_a_hub_cache_is_the_snapshot_of_its_main_branch(tmp_path):
    for commit in ("abc", "def"):
        (tmp_path / "snapshots" / commit).mkdir(parents=True)
        (tmp_path / "snapshots" / commit / "model_index.json").write_text("{}")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("def")
    assert resolve_model(tmp_path) == tmp_path / "snapshots" / "def"


@pytest.mark.parametrize("name", ["model_index.json", "config.json", "unet/config.json"])
def test_a_json_file_of_a_folder_is_no_model_and_the_error_says_so(tmp_path, name):
    (tmp_path / "unet").mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputNotFoundError, match=rf"{name}' is no model: it is one file of a folder"):
        resolve_model(tmp_path / name)

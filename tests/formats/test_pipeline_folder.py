import pytest

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.pipeline_folder import check_index, write_index
from ldm_cli.formats.scheduler_file import our_settings


def test_folder_without_pipeline_is_not_found_and_another_pipeline_is_refused(tmp_path):
    with pytest.raises(InputNotFoundError, match=r"model_index\.json"):
        check_index(tmp_path)
    write_index(tmp_path, our_settings({}))
    check_index(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(CheckpointError, match="StableDiffusion3Pipeline"):
        check_index(tmp_path)

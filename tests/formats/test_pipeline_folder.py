import json

from ldm_cli.formats.pipeline_folder import INDEX_NAME, write_index
from ldm_cli.formats.scheduler_file import our_settings


def test_the_index_names_a_scheduler_that_knows_the_process(tmp_path):
    for prediction_type, scheduler in (("epsilon", "DDIMScheduler"), ("flow_prediction", "UniPCMultistepScheduler")):
        write_index(tmp_path, our_settings({"prediction_type": prediction_type}))
        content = json.loads((tmp_path / INDEX_NAME).read_text())
        assert content["_class_name"] == "StableDiffusionPipeline"
        assert content["scheduler"] == ["diffusers", scheduler]

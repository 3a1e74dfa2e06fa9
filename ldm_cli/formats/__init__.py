"""Files of other tools, in and out: diffusers and transformers folders, pipelines."""

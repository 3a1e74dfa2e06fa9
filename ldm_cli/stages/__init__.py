"""One file per command: build the models, wire the data, say what a step is, run."""

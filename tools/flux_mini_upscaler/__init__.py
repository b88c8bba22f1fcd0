"""flux-mini-upscaler: the data, the training and the export of the embedded ControlNet. Needs requirements-dev.txt."""

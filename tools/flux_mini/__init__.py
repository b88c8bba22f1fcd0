"""flux-mini: the data, the training and the export of the embedded Flux model. Needs requirements-dev.txt."""

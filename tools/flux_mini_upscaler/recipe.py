"""What made the shipped asset."""

TRAINING: dict[str, int | float] = {"steps": 10000, "batch": 16}
COMMAND = "python -m tools.flux_mini_upscaler --work build/flux-mini-upscaler"

"""What makes hunyuan-mini: every stage with its settings, in order."""

STAGES: tuple[tuple[str, dict[str, int | float]], ...] = (
    ("vae", {"steps": 2600, "batch": 12}),
    ("latents", {"count": 6144}),
    ("transformer", {"steps": 18500, "batch": 48}),
    ("distill", {"steps": 600, "batch": 32}),
)
COMMAND = "python -m tools.hunyuan_mini --work build/hunyuan-mini"

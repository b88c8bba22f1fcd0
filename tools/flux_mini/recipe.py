"""What made the shipped asset: every stage with its settings, in order."""

STAGES: tuple[tuple[str, dict[str, int | float]], ...] = (
    ("vae", {"steps": 5000, "batch": 24}),
    ("latents", {"count": 24_576}),
    ("transformer", {"steps": 12_000, "batch": 48}),
    ("distill", {"steps": 400, "batch": 32}),
)
COMMAND = "python -m tools.flux_mini --work build/flux-mini"

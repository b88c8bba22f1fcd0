"""What made the shipped asset."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets/flux-mini"
FILE = "flux-mini-distilled.safetensors"
STEPS = 4  # Euler steps of the student
PIXELS, TOKENS, GUIDANCE = 128, 40, 3.5  # of an image's side, of a caption for T5; the teacher's guidance
TRAINING: dict[str, int | float] = {"steps": 1800, "batch": 12}
COMMAND = "python -m tools.flux_mini_distilled --work build/flux-mini-distilled"

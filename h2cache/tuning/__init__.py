"""Finding a method's setting for a target."""

from .tune import Psnr, Speedup, Trial, Tuned, Unreachable, tune

__all__ = ["Psnr", "Speedup", "Trial", "Tuned", "Unreachable", "tune"]

"""Finding a method's setting for a target."""

from .knobs import Knob, as_written
from .targets import Psnr, Speedup, Trial, WallSpeedup
from .tune import Tuned, Unreachable, tune

__all__ = ["Knob", "Psnr", "Speedup", "Trial", "Tuned", "Unreachable", "WallSpeedup", "as_written", "tune"]

"""Making a plan for a pipeline: record uncached runs, then search for the steps that are worth computing."""

from .calibrate import calibrate
from .trajectories import Trajectories, record

__all__ = ["Trajectories", "calibrate", "record"]

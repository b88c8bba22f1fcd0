"""Plans: which steps of a run are computed, and which weights stand in for the others; how they are made and kept."""

from .calibrate import Calibration, calibrate
from .plan import Plan, PlanConfig
from .promise import AtLeast, Promise
from .trajectories import Trajectories, record

__all__ = ["AtLeast", "Calibration", "Plan", "PlanConfig", "Promise", "Trajectories", "calibrate", "record"]

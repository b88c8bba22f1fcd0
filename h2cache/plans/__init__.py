"""Plans: which steps of a run are computed, and which weights stand in for the others; how they are made and kept."""

from .calibrate import calibrate
from .plan import Plan, PlanConfig
from .trajectories import Trajectories, record

__all__ = ["Plan", "PlanConfig", "Trajectories", "calibrate", "record"]

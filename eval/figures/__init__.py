"""The figures of an experiment, one class a file; configs/experiment/*.yaml list them by `_target_`."""

from eval.figures.frontier import Frontier
from eval.figures.heatmap import HeatMap
from eval.figures.rows import Rows
from eval.figures.separation import Separation
from eval.figures.traces import MetricTrace

__all__ = ["Frontier", "HeatMap", "MetricTrace", "Rows", "Separation"]

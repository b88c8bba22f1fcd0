"""The figures of an experiment, one class a file; configs/experiment/*.yaml list them by `_target_`."""

from eval.report.figures.banner import Banner
from eval.report.figures.frontier import Frontier
from eval.report.figures.heatmap import HeatMap
from eval.report.figures.rows import Rows
from eval.report.figures.separation import Separation
from eval.report.figures.traces import MetricTrace

__all__ = ["Banner", "Frontier", "HeatMap", "MetricTrace", "Rows", "Separation"]

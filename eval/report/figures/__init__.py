"""The figures of an experiment, one class a file; configs/experiment/*.yaml list them by `_target_`."""

from eval.report.figures.banner import Banner
from eval.report.figures.frontier import Frontier
from eval.report.figures.gaussianity import Gaussianity
from eval.report.figures.heatmap import HeatMap
from eval.report.figures.rows import Rows
from eval.report.figures.separation import Separation
from eval.report.figures.stability import Stability
from eval.report.figures.traces import MetricTrace

__all__ = [
    "Banner",
    "Frontier",
    "Gaussianity",
    "HeatMap",
    "MetricTrace",
    "Rows",
    "Separation",
    "Stability",
]

"""The figures of an experiment, one class a file; configs/experiment/*.yaml list them by `_target_`."""

from h2cache.eval.report.figures.banner import Banner
from h2cache.eval.report.figures.crops import Crops
from h2cache.eval.report.figures.film_strips import FilmStrips
from h2cache.eval.report.figures.frame_errors import FrameErrors
from h2cache.eval.report.figures.frontier import Frontier
from h2cache.eval.report.figures.gaussianity import Gaussianity
from h2cache.eval.report.figures.heatmap import HeatMap
from h2cache.eval.report.figures.motion import Motion
from h2cache.eval.report.figures.rows import Rows
from h2cache.eval.report.figures.seeds import SeedScale
from h2cache.eval.report.figures.separation import Separation
from h2cache.eval.report.figures.stability import Stability
from h2cache.eval.report.figures.traces import MetricTrace

__all__ = [
    "Banner",
    "Crops",
    "FilmStrips",
    "FrameErrors",
    "Frontier",
    "Gaussianity",
    "HeatMap",
    "MetricTrace",
    "Motion",
    "Rows",
    "SeedScale",
    "Separation",
    "Stability",
]

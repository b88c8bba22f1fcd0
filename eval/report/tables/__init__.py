"""Tables of an experiment: Markdown, LaTeX, CSV and the terminal; configs/experiment/*.yaml list them as outputs."""

from eval.report.tables.equal_work import EqualWork
from eval.report.tables.grid import GridTable
from eval.report.tables.jitter import JitterTable
from eval.report.tables.matched import MatchedTable
from eval.report.tables.spectrum import ErrorSpectrum
from eval.report.tables.spread import SpreadTable
from eval.report.tables.summary import SummaryTable
from eval.report.tables.throughput import ThroughputTable

__all__ = [
    "EqualWork",
    "ErrorSpectrum",
    "GridTable",
    "JitterTable",
    "MatchedTable",
    "SpreadTable",
    "SummaryTable",
    "ThroughputTable",
]

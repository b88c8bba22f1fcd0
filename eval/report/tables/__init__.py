"""Tables of an experiment: Markdown, LaTeX, CSV and the terminal; configs/experiment/*.yaml list them as outputs."""

from eval.report.tables.equal_work import EqualWork
from eval.report.tables.grid import GridTable
from eval.report.tables.matched import MatchedTable
from eval.report.tables.spread import SpreadTable
from eval.report.tables.summary import SummaryTable
from eval.report.tables.throughput import ThroughputTable

__all__ = ["EqualWork", "GridTable", "MatchedTable", "SpreadTable", "SummaryTable", "ThroughputTable"]

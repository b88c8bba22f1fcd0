"""Tables of an experiment: Markdown, LaTeX, CSV and the terminal; configs/experiment/*.yaml list them as outputs."""

from h2cache.eval.report.tables.adherence import Adherence, AttributeChanges
from h2cache.eval.report.tables.enlargement import EnlargementTable
from h2cache.eval.report.tables.equal_work import EqualWork
from h2cache.eval.report.tables.grid import GridTable
from h2cache.eval.report.tables.jitter import JitterTable
from h2cache.eval.report.tables.lead import LeadTable
from h2cache.eval.report.tables.matched import MatchedTable
from h2cache.eval.report.tables.promise import Promise
from h2cache.eval.report.tables.spectrum import ErrorSpectrum
from h2cache.eval.report.tables.spread import SpreadTable
from h2cache.eval.report.tables.summary import SummaryTable
from h2cache.eval.report.tables.throughput import ThroughputTable

__all__ = [
    "Adherence",
    "AttributeChanges",
    "EnlargementTable",
    "EqualWork",
    "ErrorSpectrum",
    "GridTable",
    "JitterTable",
    "LeadTable",
    "MatchedTable",
    "Promise",
    "SpreadTable",
    "SummaryTable",
    "ThroughputTable",
]

"""See where the memory of a run went: the profiler callback, and its report in the terminal and elsewhere."""

from lightning_memtrain.report.advice import largest_holders
from lightning_memtrain.report.environment import environment
from lightning_memtrain.report.memory_report import (
    HTML_NAME,
    JSON_NAME,
    SCHEMA_VERSION,
    LargestHolder,
    MemoryReport,
    OutOfMemory,
    StepPeak,
)
from lightning_memtrain.report.outputs.html import render_html, save_html
from lightning_memtrain.report.outputs.loggers import define_metrics, log_report, log_scalars
from lightning_memtrain.report.outputs.metric_names import breakdown_metrics
from lightning_memtrain.report.outputs.report_table import print_table, render_table
from lightning_memtrain.report.profiler import MemoryProfiler

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "SCHEMA_VERSION",
    "LargestHolder",
    "MemoryProfiler",
    "MemoryReport",
    "OutOfMemory",
    "StepPeak",
    "breakdown_metrics",
    "define_metrics",
    "environment",
    "largest_holders",
    "log_report",
    "log_scalars",
    "print_table",
    "render_html",
    "render_table",
    "save_html",
]

"""See where the memory of a run went: the profiler callback, and its report in the terminal and elsewhere."""

from typing import TYPE_CHECKING

from lightning_memtrain.compat.first_use import at_first_use
from lightning_memtrain.report.memory_report import draw_with

if TYPE_CHECKING:
    from lightning_memtrain.report.advice import largest_holders
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
    from lightning_memtrain.report.outputs.own_loop import report_of_steps
    from lightning_memtrain.report.outputs.report_table import print_table, render_table
    from lightning_memtrain.report.profiler import MemoryProfiler
    from lightning_memtrain.report.run_environment import environment
else:
    # So that a report can be read and printed without torch and Lightning, which take seconds to import.
    __getattr__ = at_first_use(
        __name__,
        {
            "HTML_NAME": "memory_report",
            "JSON_NAME": "memory_report",
            "SCHEMA_VERSION": "memory_report",
            "LargestHolder": "memory_report",
            "MemoryProfiler": "profiler",
            "MemoryReport": "memory_report",
            "OutOfMemory": "memory_report",
            "StepPeak": "memory_report",
            "breakdown_metrics": "outputs.metric_names",
            "define_metrics": "outputs.loggers",
            "environment": "run_environment",
            "largest_holders": "advice",
            "log_report": "outputs.loggers",
            "log_scalars": "outputs.loggers",
            "print_table": "outputs.report_table",
            "render_html": "outputs.html",
            "report_of_steps": "outputs.own_loop",
            "render_table": "outputs.report_table",
            "save_html": "outputs.html",
        },
    )

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
    "report_of_steps",
    "save_html",
]


def _table(report: "MemoryReport") -> str:
    from lightning_memtrain.report.outputs.report_table import table_text

    return table_text(report)


def _page(report: "MemoryReport") -> str:
    from lightning_memtrain.report.outputs.html import render_html

    return render_html(report)


draw_with(table=_table, page=_page)

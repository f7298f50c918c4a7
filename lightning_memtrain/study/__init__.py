"""Many runs of a recipe as one study, and runs side by side: what was run, what came of it, and figures."""

from lightning_memtrain.study.comparison import (
    ChangedModule,
    ComparedRun,
    Comparison,
    LoadedRun,
    compare_runs,
    load_run,
)
from lightning_memtrain.study.pareto_front import pareto_front
from lightning_memtrain.study.run_record import RunRecord
from lightning_memtrain.study.study_result import StudyResult, StudyRun, VariantResult

__all__ = [
    "ChangedModule",
    "ComparedRun",
    "Comparison",
    "LoadedRun",
    "RunRecord",
    "StudyResult",
    "StudyRun",
    "VariantResult",
    "compare_runs",
    "load_run",
    "pareto_front",
]

"""The paper's transfer sets: what they are (table), where they lie (layouts), how they are divided (task)."""

from simclr_fast.evaluation.benchmarks.table import BENCHMARKS, Benchmark, published
from simclr_fast.evaluation.benchmarks.task import Task, fingerprint, open_task

__all__ = ["BENCHMARKS", "Benchmark", "Task", "fingerprint", "open_task", "published"]

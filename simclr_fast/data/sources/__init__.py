"""Where images come from: what is found in folders, tars, lists and known sets, each checked once (see dataset.py)."""

from simclr_fast.data.sources.dataset import (
    FEW,
    KNOWN,
    TOLERATE,
    DataError,
    Dataset,
    Split,
    cache_folder,
    datasets_folder,
    open_dataset,
    write_skipped,
)

__all__ = [
    "FEW",
    "KNOWN",
    "TOLERATE",
    "DataError",
    "Dataset",
    "Split",
    "cache_folder",
    "datasets_folder",
    "open_dataset",
    "write_skipped",
]

"""What the commands that load an encoder have in common: errors in one sentence, exit statuses, and processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from simclr_fast.checkpoint import CheckpointError
from simclr_fast.config import ConfigError
from simclr_fast.data import DataError
from simclr_fast.distributed import Ranks, unreachable
from simclr_fast.launch import USER_ERROR, launch, launched, speaks_for_host, world_size
from simclr_fast.record import RunError


def ended(work: Callable[[list[Ranks]], int]) -> int:
    """The exit status of a command.

    Args:
        work: does it, and puts into the list the group that it has joined, which is left at the end.
    Returns:
        What `work` returns; 2 after an error of the user's, 1 after one of the disk's, 130 after Ctrl-C.
    """
    joined: list[Ranks] = []
    try:
        return _status(work, joined)
    finally:
        for ranks in joined:  # after an error is handled, for its traceback holds the group
            ranks.close()


def _status(work: Callable[[list[Ranks]], int], joined: list[Ranks]) -> int:
    try:
        return work(joined)
    except (ConfigError, DataError, RunError, CheckpointError, OSError) as error:
        tell(told(error, joined))
        return 1 if isinstance(error, OSError) else USER_ERROR  # a full or a failing disk
    except RuntimeError as error:
        if not (sentence := unreachable(error)):
            raise
        tell(sentence)
        return 1
    except KeyboardInterrupt:
        tell("stopped before the end" if speaks_for_host() else "")
        return 130


def told(error: Exception, joined: Sequence[Ranks]) -> str:
    """An error as this process has to tell it; "" where another one tells it.

    Of those that a host's ranks share the first one speaks; of its own, a rank speaks itself, for no other knows it.

    Args:
        joined: the group, if one was joined.
    """
    for ranks in joined:
        if not ranks.ends_alike(str(error)):
            return f"error: rank {ranks.rank}: {error}"
    return f"error: {error}" if speaks_for_host() else ""


def tell(text: str) -> None:
    """A line on stderr; nothing for an empty text."""
    if text:
        with suppress(OSError):  # the log may lie on a disk that is full
            print(text, file=sys.stderr, flush=True)


def over_ranks(
    module: str,
    argv: Sequence[str],
    settings: Any,
    joined: list[Ranks],
    check: Callable[[], object],
    work: Callable[[Ranks], None],
) -> int:
    """Do `work` on as many processes as the settings (`gpus`, `ranks`, `timeout`) ask for; returns the exit status.

    Args:
        module: that is started again with `argv` for each process, where there are to be several.
        check: raises, before that, what is wrong, so that it is said once.
    """
    world = world_size(settings.gpus, settings.ranks)
    if world > 1 and not launched():
        check()
        return launch(module, argv, world)
    joined.append(Ranks(use_gpu=settings.gpus != 0 and torch.cuda.is_available(), timeout=settings.timeout))
    work(joined[0])
    return 0

"""Where the time of the trainer's own step goes, seen from outside: hooks on its parts mark when each of them ends.

A mark is the host's clock on a CPU, an event in the stream on a GPU, so that the host waits for nothing while it marks.

    waiting   for the next views: on a CPU the host does, on a GPU the stream is empty
    input     the two views made one tensor, learning rate and gradients reset, until the encoder begins
    encoder   forward
    head      forward
    loss      forward, over all ranks: with several, the embeddings are gathered here
    backward  from the loss to LARS: gradients, their sums over the ranks as far as these are not hidden behind the
              network's own work, and the look for infinities
    LARS      optimizer.step()
    rest      running statistics, and the numbers that are shown
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from _data_contenders import Views
from _step_contenders import Trainer

PHASES = ("waiting", "input", "encoder", "head", "loss", "backward", "LARS", "rest")


class Marks:
    """Moments of a step, each the end of a phase."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._ends: list[tuple[str, Any]] = []

    def __call__(self, phase: str) -> None:
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._ends.append((phase, moment))

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each phase of each step that began with "start"; phases of one name are added up."""
        if self._cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        for (_, a), (phase, b) in zip([self._ends[0], *self._ends], self._ends, strict=False):
            if phase == "start":
                found.append(defaultdict(float))
            else:
                found[-1][phase] += a.elapsed_time(b) if self._cuda else 1e3 * (b - a)
        return found


@contextmanager
def marked(trainer: Trainer, mark: Callable[[str], None]) -> Iterator[None]:
    """Within, the parts of the trainer's step call `mark` with the phase that ends; the step itself is as it was."""
    network, optimizer, loss = trainer.network, trainer.optimizer, trainer.network.loss

    def marked_loss(*args: Any, **options: Any) -> Any:
        found = loss(*args, **options)
        mark("loss")
        return found

    with ExitStack() as stack:
        for handle in (
            network.encoder.register_forward_pre_hook(lambda *_: mark("input")),
            network.encoder.register_forward_hook(lambda *_: mark("encoder")),
            network.head.register_forward_hook(lambda *_: mark("head")),
            optimizer.register_step_pre_hook(lambda *_: mark("backward")),
            optimizer.register_step_post_hook(lambda *_: mark("LARS")),
        ):
            stack.callback(handle.remove)
        network.loss = marked_loss  # type: ignore[assignment]
        stack.callback(delattr, network, "loss")
        yield


def phases(
    trainer: Trainer, views: Iterator[Views], device: torch.device, skip: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds of each phase in each of some steps, after `skip` that are not counted."""
    mark = Marks(device)
    with marked(trainer, mark):
        for _ in range(skip + steps):
            mark("start")
            made = next(views)
            mark("waiting")
            trainer.step(*made)
            mark("rest")
    return {phase: [spans[phase] for spans in mark.steps()[skip:]] for phase in PHASES}

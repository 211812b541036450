"""Errors and times of the contenders for one 2N and D: who agrees with float64 is timed, all of them in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from _contenders import OURS, Contender, expected
from _harness import Stopwatch, interleave, quantiles, ratio
from _memory import failure, inputs
from torch import Tensor

Truth = tuple[Tensor, Tensor] | None


class Step:
    """Forward and backward pass of a contender over its own inputs."""

    def __init__(self, contender: Contender, n: int, D: int, tau: float, device: str) -> None:
        self.contender, self.loss, self.views = contender, contender.build(tau), inputs(n, D, device)

    def forward(self, _: object = None) -> Tensor:
        return self.loss(*self.views)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.views)

    def errors(self, truth: Truth) -> dict[str, float | None]:
        """Relative errors of loss and gradient; None where there is nothing to compare with."""
        with self.contender.context():
            loss = self.forward()
            gradient = torch.cat(self.backward(loss))
            loss = loss.detach()
        if truth is None:
            return {"error_loss": None, "error_gradient": None}
        found = [float((a.double() - b).norm() / b.norm()) for a, b in zip((loss, gradient), truth, strict=True)]
        return dict(zip(("error_loss", "error_gradient"), found, strict=True))

    def lap(self, watch: Stopwatch) -> list[float]:
        with self.contender.context():
            return watch.lap(self.forward, self.backward)


def disagreement(found: dict[str, float | None], tolerance: float) -> str | None:
    wrong = [f"{key} {value:.1e}" for key, value in found.items() if value is not None and not value <= tolerance]
    return f"ERROR: another value than float64, {', '.join(wrong)}; allowed {tolerance:.0e}" if wrong else None


def measure(
    case: tuple[int, int], results: dict[Contender, dict[str, Any]], tau: float, device: str, seconds: float
) -> None:
    """Add errors and times to the results of the contenders whose status is "ok" so far."""
    laps: dict[str, Callable[[], list[float]]] = {}
    truths: dict[str, Truth] = {}
    watch = Stopwatch(device)
    for contender, result in results.items():
        if result["status"] != "ok":
            continue
        try:
            if contender.kind not in truths:
                truths[contender.kind] = expected(contender.kind, *inputs(*case, device), tau)
            step = Step(contender, *case, tau, device)
            found = step.errors(truths[contender.kind])
            result |= found | {"status": disagreement(found, contender.tolerance) or "ok"}
        except Exception as error:
            result["status"] = failure(error)
        if result["status"] == "ok":
            laps[contender.name] = lambda step=step: step.lap(watch)
        gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    rounds = interleave(laps, seconds, least=3, most=100)
    both = {name: [sum(times) for times in raw] for name, raw in rounds.items()}
    for contender, result in results.items():
        if contender.name not in rounds:
            continue
        forward, backward = zip(*rounds[contender.name], strict=True)
        spans = {"forward": forward, "backward": backward, "both": both[contender.name]}
        result["ms"] = {key: quantiles(times) for key, times in spans.items()}
        result["raw_ms"] = {key: [float(f"{t:.5g}") for t in times] for key, times in spans.items()}
        if OURS in both:
            result["ours_over_it"] = ratio(both[OURS], both[contender.name])

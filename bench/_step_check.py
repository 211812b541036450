"""Before a step is timed: that it computes what the others compute, what memory it takes, and what batch fits."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from _data_contenders import Views
from _memory import failure
from _step_contenders import Contender, Task, Trainer, method_config, synthetic
from torch import Tensor, nn

from simclr_fast.distributed import Ranks
from simclr_fast.methods.simclr import Method

TOLERANCE = {
    "fp32": {"error_loss": 1e-4, "error_gradient": 2e-2, "error_along": 2e-2},
    "bf16": {"error_loss": 3e-2, "error_gradient": 0.5, "error_along": 0.1},
}
"""Relative. A ReLU that rounding turns off moves a gradient by 1e-3 and more; bf16 turns off many, in all directions:
the part along the true gradient tells more surely whether a factor or a part is missing."""
SHIFT = "head.4.bias"  # of the last BN, which some have and which starts at 0

Evaluated = tuple[Tensor, dict[str, Tensor]]
"""A step's loss, mean over the ranks, and the gradient of each parameter; on the CPU."""


def weights(task: Task) -> dict[str, Tensor]:
    """The weights that all start from. BatchNorm's scales that start at 0, and so hide their branch, are drawn instead;
    small, since a deep network of large ones makes chaos of bf16's rounding."""
    torch.manual_seed(0)
    method = Method(method_config(task))
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data += torch.where(module.weight == 0, 0.2, 0.0) * torch.rand_like(module.weight)
    return method.state_dict()


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """
    Raises:
        RuntimeError: it is another network.
    """
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {SHIFT}:
        raise RuntimeError(f"another network: it lacks {unexpected}, and has {missing}")


def evaluated(trainer: Trainer, views: Views) -> Evaluated:
    """One step on the views; the weights move."""
    grads: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        grads.update({name: p.grad.detach().double().cpu() for name, p in trainer.network.named_parameters()})

    handle = trainer.optimizer.register_step_pre_hook(keep)
    try:
        loss = trainer.step(*views).detach().double()
    finally:
        handle.remove()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.cpu(), grads


@contextlib.contextmanager
def exact_fp32():
    """Convolutions and products of float32 in float32, where a GPU would round to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def truth(contender: Contender, task: Task, state: dict[str, Tensor]) -> Evaluated:
    """What a contender computes in float32."""
    task = replace(task, precision="fp32")
    with exact_fp32():
        trainer = contender.build(task)
        load(trainer.network, state)
        return evaluated(trainer, synthetic(task, contender))


def errors(found: Evaluated, expected: Evaluated) -> dict[str, float]:
    """Relative errors of the loss, of the gradient over all parameters that both have, and of its part along the
    expected one."""
    (loss, grads), (true_loss, true_grads) = found, expected
    true = torch.cat([g.flatten() for g in true_grads.values()])
    ours = torch.cat([grads[name].flatten() for name in true_grads])
    return {
        "error_loss": float((loss - true_loss).abs() / true_loss),
        "error_gradient": float((ours - true).norm() / true.norm()),
        "error_along": float((ours @ true / (true @ true) - 1).abs()),
    }


def disagreement(found: dict[str, float], precision: str) -> str | None:
    """What is wrong with errors, if they are too large or no numbers."""
    allowed = TOLERANCE[precision]
    wrong = [
        f"{key} {value:.1e}, allowed {allowed[key]:.0e}" for key, value in found.items() if not value <= allowed[key]
    ]
    return f"ERROR: another function than the trainer's step: {'; '.join(wrong)}" if wrong else None


def prepare(
    contender: Contender, task: Task, state: dict[str, Tensor], expected: Evaluated | None
) -> tuple[Trainer | None, dict[str, Any]]:
    """A trainer ready to be timed, if it can be, and what is known of it: status, errors, first step, memory."""
    cuda, found = task.device.type == "cuda", {"status": "ok"}
    try:
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer = contender.build(task)
        load(trainer.network, state)
        views, began = synthetic(task, contender), time.perf_counter()
        told = evaluated(trainer, views)
        found["first_step_s"] = time.perf_counter() - began
        trainer.step(*views)
        found["memory_bytes"] = torch.cuda.max_memory_allocated() - before if cuda else None
        if expected is not None:
            found |= errors(told, expected)
            found["status"] = disagreement(errors(told, expected), task.precision) or "ok"
    except ImportError as error:
        found["status"] = f"not installed ({error})"
    except Exception as error:
        found["status"] = failure(error)
    return (trainer if found["status"] == "ok" else None), found


def agreed(ranks: Ranks, status: str) -> str:
    """The same on every rank: ok, or the first other status that one of them has."""
    every = [status] * ranks.world
    if ranks.group is not None:
        dist.all_gather_object(every, status)
    return next((told for told in every if told != "ok"), "ok")


def peak_of(contender: Contender, task: Task) -> Callable[[int], int | str]:
    """Batch -> the most bytes of a GPU that two steps of it take, or why they cannot be made."""

    def attempt(batch: int) -> int | str:
        tried, before = replace(task, batch=batch), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            trainer, views = contender.build(tried), synthetic(tried, contender)
            for _ in range(2):
                trainer.step(*views)
            torch.cuda.synchronize()
        except Exception as error:
            return failure(error)
        return torch.cuda.max_memory_allocated() - before

    def clean(batch: int) -> int | str:
        told = attempt(batch)
        gc.collect()
        torch.cuda.empty_cache()
        return told

    return clean


def largest(peak: Callable[[int], int | str], start: int) -> dict[str, Any]:
    """The largest batch that does not fail, to 1/16, from `start` upwards, its memory, and what a larger one says; 0:
    not even `start`."""
    good, memory, bad, told = 0, None, start, peak(start)
    while isinstance(told, int):
        good, memory, bad = bad, told, 2 * bad
        told = peak(bad)
    why = told
    while good and bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        told = peak(middle)
        if isinstance(told, int):
            good, memory = middle, told
        else:
            bad, why = middle, told
    return {"largest_batch": good, "largest_memory_bytes": memory, "larger": why}

"""The operator simclr_fast::lars_step: what it refuses, how it is registered."""

import pytest
import torch

from simclr_fast.optim import steps
from tests.lars_common import fused


def arguments_of_a_step() -> dict:
    ones = [torch.ones(2)]
    chunk, chunks, scratch = steps.workspace(ones, 1)
    hyper = torch.ones(1, len(steps.HYPER), dtype=torch.float64)
    return {
        "params": ones, "grads": [torch.ones(2)], "velocities": [torch.zeros(2)], "groups": [0], "hyper": hyper,
        "lrs": [None], "decays": [None], "averages": [], "ema": 0.0, "copies": [], "copied": [],
        "grad_scale": None, "found_inf": None, "max_norm": None, "chunk": chunk, "chunks": chunks, "scratch": scratch,
    }  # fmt: skip


@fused
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [1]}, "groups"),
        ({"groups": []}, "length"),
        ({"grads": [torch.ones(3)]}, "shape"),
        ({"grads": [torch.ones(2, dtype=torch.float64)]}, "dtype"),
        ({"velocities": [torch.ones(2, dtype=torch.float64)]}, "dtype"),
        ({"averages": [torch.ones(3)]}, "shape"),
        ({"copies": [torch.ones(2)], "copied": [0]}, "half precision"),
        ({"copies": [torch.ones(2).half()], "copied": [1]}, r"copied\[0\]"),
        ({"copies": [torch.ones(2).half()]}, "length"),
        ({"hyper": torch.ones(1, 5, dtype=torch.float64)}, "hyper"),
        ({"lrs": [torch.ones(2)]}, "single float32"),
        ({"found_inf": torch.ones(1, dtype=torch.float64)}, "single float32"),
        ({"params": [torch.ones(2, dtype=torch.int32)]}, "float32"),
        ({"chunk": 6}, "multiple of 4"),
        ({"chunks": torch.zeros(2, 3, dtype=torch.int64)}, "other tensors"),
        ({"chunks": torch.tensor([[0, 0, 3]])}, "other tensors"),
        ({"chunks": torch.tensor([[0, 0, 1]])}, "other tensors"),
        ({"chunks": torch.tensor([[1, 0, 2]])}, "other tensors"),
        ({"scratch": [torch.zeros(4)]}, "other tensors"),
    ],
)
def test_the_operator_checks_its_arguments(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.simclr_fast.lars_step(*(arguments_of_a_step() | change).values())


@fused
def test_the_operator_is_registered_as_it_behaves() -> None:
    arguments = tuple(arguments_of_a_step().values())
    torch.library.opcheck(
        torch.ops.simclr_fast.lars_step.default, arguments, test_utils=("test_schema", "test_faketensor")
    )

"""The losses as registered operators: opcheck of every one, torch.compile for any N, torch.export."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_fast.losses import info_nce, nt_xent
from tests.losses_common import DEVICE, OURS, few, pairs, rows, run, run_info_nce

PREFIXES = ("simclr_fast::nt_xent", "simclr_fast::info_nce")
CHEAP = {"test_utils": ("test_schema", "test_faketensor")}


class Record(TorchDispatchMode):
    """The calls of our operators, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(PREFIXES):
            self.calls.setdefault(func.name(), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def use_every_operator(backend):
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(5, 3))
    more = rows(4, 3).to(DEVICE[backend])
    tau = torch.tensor(0.3, device=DEVICE[backend])
    for reduction in ("mean", "none"):
        leaves = [x.clone().requires_grad_() for x in (z1, z2, tau)]
        options = {"reduction": reduction, "backend": backend, "return_stats": "all"}
        nt_xent(*leaves, **options)[0].sum().backward()
        leaves = [x.clone().requires_grad_() for x in (z1, z2, tau, more)]
        options |= {"return_stats": True, "symmetric": True}
        info_nce(*leaves[:3], negatives=leaves[3], **options)[0].sum().backward()


def registered():
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in names if name.startswith(PREFIXES)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@OURS
def test_opcheck_of_every_operator(backend):
    with Record() as record:
        use_every_operator(backend)
    assert {name.split(".")[0] for name in record.calls} == registered()
    for name, (operator, args, kwargs) in record.calls.items():
        forward = not any(part in name for part in ("backward", "stats"))
        args = [
            x.detach().clone().requires_grad_(forward and x.is_floating_point()) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
        torch.library.opcheck(operator, tuple(args), kwargs, **(few(CHEAP, {}) if backend == "triton" else {}))


def compiled(function, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(loss, leaves):
    loss.backward()
    return [loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


@pytest.mark.parametrize(
    ("backend", "dynamic", "most"),
    [("native", None, 2), ("native", True, 1), ("native", False, 4), ("triton", None, 2)],
)
def test_compiled_once_for_all_n(backend, dynamic, most):
    loss_of = compiled(lambda a, b, t: nt_xent(a, b, t, return_stats=True, backend=backend), dynamic=dynamic)
    for n in (5, 6, 8, 13) if backend == "native" else (5, 6):
        leaves = [x.to(DEVICE[backend]).requires_grad_() for x in (*pairs(n, 4), torch.tensor(0.3))]
        loss, stats = loss_of(*leaves)
        wanted = run(*pairs(n, 4), torch.tensor(0.3), backend)
        for got, expected in zip(gradients(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
        eager = nt_xent(*leaves, return_stats=True, backend=backend)[1]
        torch.testing.assert_close(stats, eager)
    assert graphs() <= most


@pytest.mark.parametrize("backend", few(["native"], ["native", "triton"]))
def test_info_nce_compiled_once_for_all_sizes(backend):
    def loss(q, k, t, negatives):
        return info_nce(q, k, t, negatives=negatives, symmetric=True, backend=backend)

    loss_of = compiled(loss)
    for n, m in ((5, 7), (6, 3)):
        inputs = (*pairs(n, 4), torch.tensor(0.3), rows(m, 4, seed=1))
        leaves = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
        wanted = run_info_nce(*inputs[:3], backend, inputs[3], symmetric=True)
        for got, expected in zip(gradients(loss_of(*leaves), leaves), wanted, strict=True):
            torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert graphs() <= 2


@OURS
def test_compiled_with_what_comes_before_and_after(backend):
    """The loss inside a larger graph, under autocast, with a temperature that is a function of a parameter."""
    weight = rows(4, 6).to(DEVICE[backend]).requires_grad_()
    log_tau = torch.tensor(-1.5, device=DEVICE[backend], requires_grad=True)
    x1, x2 = (z.to(DEVICE[backend]) for z in pairs(7, 4))

    def loss(a, b):
        with torch.autocast(DEVICE[backend], torch.bfloat16):
            return nt_xent(a @ weight, b @ weight, log_tau.exp(), backend=backend) * 3 + 1

    wanted = torch.autograd.grad(loss(x1, x2), (weight, log_tau))
    got = torch.autograd.grad(compiled(loss)(x1, x2), (weight, log_tau))
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-5)


@OURS
def test_export(backend):
    class Loss(torch.nn.Module):
        def forward(self, a, b):
            return nt_xent(a, b, 0.2, backend=backend)

    n = torch.export.Dim("n", min=2)
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(6, 5))
    program = torch.export.export(Loss(), (z1, z2), dynamic_shapes=({0: n}, {0: n}))
    other = [z.to(DEVICE[backend]) for z in pairs(9, 5)]
    torch.testing.assert_close(program.module()(*other), nt_xent(*other, 0.2, backend=backend))
    assert any("simclr_fast" in str(node.target) for node in program.graph.nodes)

"""NT-Xent under autograd: any subset of inputs, modes, hooks, checkpointing, second derivatives, torch.func."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from simclr_fast.losses import nt_xent
from tests.losses_common import DEVICE, EVERY, F64, OURS, few, pairs, rows, run

SUBSETS = [subset for subset in itertools.product([True, False], repeat=3) if any(subset)]


def inputs(backend, n=6, d=5, tau=0.2):
    return [x.to(DEVICE[backend]) for x in (*pairs(n, d), torch.tensor(tau))]


def same_bits(got, wanted):
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("backend", "wants"),
    [("native", wants) for wants in SUBSETS] + [("triton", wants) for wants in few(SUBSETS[3:5], SUBSETS)],
)
def test_any_subset_wants_a_gradient(backend, wants):
    leaves = [x.requires_grad_(want) for x, want in zip(inputs(backend), wants, strict=True)]
    wanted = run(*pairs(6, 5), torch.tensor(0.2), backend)
    loss = nt_xent(*leaves, backend=backend)
    loss.backward()
    for leaf, want, gradient in zip(leaves, wants, wanted[1:], strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad.cpu(), gradient, check_dtype=False, rtol=1e-5, atol=1e-7)


@EVERY
def test_without_gradients(backend):
    z1, z2, tau = inputs(backend)
    loss = nt_xent(z1, z2, tau, backend=backend)
    assert not loss.requires_grad
    tau.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = nt_xent(z1.requires_grad_(), z2, tau, backend=backend)
            assert not quiet.requires_grad
            assert quiet == loss
    with torch.inference_mode():
        made_there = [x * 1 for x in (z1, z2, tau)]
        assert nt_xent(*made_there, backend=backend) == loss
    assert nt_xent(z1, z2, tau, backend=backend).requires_grad


@EVERY
def test_backward_again(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    loss = nt_xent(*leaves, backend=backend)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert same_bits(torch.autograd.grad(loss, leaves, retain_graph=True), [x.cpu() for x in once])
    loss.backward()
    loss_again = nt_xent(*leaves, backend=backend)
    loss_again.backward()
    assert same_bits([leaf.grad for leaf in leaves], [2 * x.cpu() for x in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@EVERY
def test_inputs_stay_as_they_are(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    before, versions = [x.detach().clone() for x in leaves], [x._version for x in leaves]
    loss = nt_xent(*leaves, backend=backend)
    loss.backward(torch.ones_like(loss))
    assert versions == [x._version for x in leaves]
    assert same_bits(before, [x.detach().cpu() for x in leaves])


@EVERY
def test_writing_to_an_input_before_backward_is_noticed(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    z1 = leaves[0] * 1
    loss = nt_xent(z1, *leaves[1:], backend=backend)
    z1.add_(1)
    if backend == "reference":
        return loss.backward()  # torch.cat has copied it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "d", "tau"), [(5, 3, 0.3), (2, 1, 1.0), (3, 8, 0.07)])
def test_gradcheck(backend, reduction, n, d, tau):
    leaves = [x.requires_grad_() for x in (*pairs(n, d, dtype=F64), torch.tensor(tau, dtype=F64))]
    options = {"reduction": reduction, "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: nt_xent(*x, **options), leaves)
    assert torch.autograd.gradcheck(lambda *x: nt_xent(*x, tau, **options), leaves[:2])


@OURS
def test_second_derivative_is_refused(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    grads = torch.autograd.grad(nt_xent(*leaves, backend=backend), leaves, create_graph=True)
    assert same_bits(grads, run(*pairs(6, 5), torch.tensor(0.2), backend)[1:3] + [grads[2].detach().cpu()])
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivative only"):
            grad.sum().backward(retain_graph=True)


def test_second_derivative_of_the_reference():
    leaves = [x.requires_grad_() for x in (*pairs(3, 4, dtype=F64), torch.tensor(0.5, dtype=F64))]
    assert torch.autograd.gradgradcheck(lambda *x: nt_xent(*x, backend="reference"), leaves)


@EVERY
def test_hooks_see_the_gradient_once(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    wanted, seen = run(*pairs(6, 5), torch.tensor(0.2), backend), []
    z1 = leaves[0] * 1
    z1.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
    leaves[1].register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    nt_xent(z1, *leaves[1:], backend=backend).backward()
    assert len(seen) == 2
    assert sum(same_bits([x], [wanted[1]]) or same_bits([x], [wanted[2]]) for x in seen) == 2
    assert torch.equal(leaves[0].grad.cpu(), 2 * wanted[1])


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(backend, reentrant):
    weight = rows(5, 5).to(DEVICE[backend]).requires_grad_()
    z1, z2, tau = (x.requires_grad_() for x in inputs(backend))

    def loss(a, b, t):
        return nt_xent(a @ weight, b @ weight, t, backend=backend)

    wanted = torch.autograd.grad(loss(z1, z2, tau), (weight, z1, z2, tau))
    checkpoint(loss, z1, z2, tau, use_reentrant=reentrant).backward()
    assert same_bits([x.grad for x in (weight, z1, z2, tau)], [x.cpu() for x in wanted])


@EVERY
def test_saved_tensors_may_be_moved(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    wanted = torch.autograd.grad(nt_xent(*leaves, backend=backend), leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = nt_xent(*leaves, backend=backend)
    assert same_bits(torch.autograd.grad(loss, leaves), [x.cpu() for x in wanted])


@EVERY
def test_anomaly_detection(backend):
    leaves = [x.requires_grad_() for x in inputs(backend)]
    with torch.autograd.set_detect_anomaly(True):
        nt_xent(*leaves, backend=backend).backward()
        leaves[0].data[0] = torch.nan
        loss = nt_xent(*leaves, backend=backend)
        with (
            pytest.warns(UserWarning, match="Error detected"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            loss.backward()


def transforms(z1, z2, backend):
    """Of the loss, by torch.func and forward-mode differentiation."""

    def loss(a, b):
        return nt_xent(a, b, 0.2, backend=backend)

    yield lambda: torch.func.grad(loss)(z1, z2)
    yield lambda: torch.func.vmap(loss)(torch.stack([z1, z2]), torch.stack([z2, z1]))
    yield lambda: torch.func.jvp(loss, (z1, z2), (z2, z1))
    yield lambda: torch.func.hessian(loss)(z1, z2)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of PyTorch's forward mode
@OURS
@pytest.mark.parametrize("kind", range(4))
def test_transforms_are_refused_with_advice(backend, kind):
    z1, z2, _ = inputs(backend)
    transform = list(transforms(z1, z2, backend))[kind]
    with pytest.raises(
        RuntimeError, match="nt_xent cannot be transformed .*use torch.autograd, or backend='reference'"
    ):
        transform()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms_of_the_reference():
    z1, z2, _ = inputs("reference")
    grad, batch, (value, tangent), hessian = (transform() for transform in transforms(z1, z2, "reference"))
    loss, g1, g2, _ = run(z1, z2, 0.2, "reference")
    torch.testing.assert_close(grad, g1)
    torch.testing.assert_close(batch, loss.expand(2))
    torch.testing.assert_close((value, tangent), (loss, (g1 * z2 + g2 * z1).sum()))
    assert hessian.shape == (*z1.shape, *z1.shape)

"""What the tests of the contrastive losses share: inputs, float64 truths, and how far from them a result may be."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.losses import blocked, info_nce, nt_xent

# The Triton kernels run on the GPU if there is one, else in Triton's interpreter.
INTERPRETED = not torch.cuda.is_available()
DEVICE = dict.fromkeys(("reference", "native", "fixed", "tiles"), "cpu") | {"triton": "cpu" if INTERPRETED else "cuda"}
EVERY = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
OURS = pytest.mark.parametrize("backend", ["native", "triton"])
# For `run` and `run_info_nce`: "fixed" is the native backend with a temperature that wants no gradient, "tiles" is
# it with tiles so small that a few rows make several.
EVERY_WAY = pytest.mark.parametrize("backend", ["reference", "native", "fixed", "tiles", "triton"])
OUR_WAYS = pytest.mark.parametrize("backend", ["native", "fixed", "tiles", "triton"])
F64 = torch.float64
# Beyond twice the error of PyTorch in the same dtype. The interpreter multiplies tf32 in float32, and cuts bf16 off
# where a GPU rounds it.
ROOM = {
    "fp32": 3e-6,
    "tf32": 3e-6 if INTERPRETED else 2e-3,
    "fp16": 3e-4,
    "bf16": 6e-2 if INTERPRETED else 3e-3,
}


def few(some, every):
    """Every case, but some where kernels are interpreted: that takes a thousand times as long."""
    return some if INTERPRETED else every


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def pairs(n, d, seed=0, dtype=torch.float32):
    """Two views [n, d] that resemble each other."""
    z1, other = rows(2, n, d, seed=seed, dtype=F64)
    return z1.to(dtype), (z1 + other).to(dtype)


def trained(n, d, cosine, seed=0, dtype=torch.float32):
    """Two views whose pairs have this cosine, and whose strangers are nearly orthogonal."""
    z1, other = (F.normalize(x) for x in rows(2, n, d, seed=seed, dtype=F64))
    other = F.normalize(other - (other * z1).sum(1, keepdim=True) * z1)
    return z1.to(dtype), (cosine * z1 + math.sqrt(1 - cosine**2) * other).to(dtype)


def differentiate(function, inputs, upstream=1.0, device="cpu"):
    """The loss, and its gradient with respect to each input, on the CPU."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    loss = function(*leaves)
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)
    loss.backward(upstream.expand_as(loss))
    return [loss.detach().cpu()] + [leaf.grad.cpu() for leaf in leaves]


def rescaled(function, inputs, upstream, dtype):
    """The same with the loss scaled, so that a gradient in float16 loses digits to rounding but none to its range."""
    scale = 64.0 * len(inputs[0]) if dtype == torch.float16 else 1.0
    loss, *grads = differentiate(function, inputs, upstream * scale)
    return [loss, *(grad / scale for grad in grads)]


@contextlib.contextmanager
def backend_of(way):
    """The backend, set up to go this way."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"SMALL": 0, "ROWS": 4, "COLUMNS": 8, "CHUNK": 5} if way == "tiles" else {}
        for name, size in sizes.items():
            patch.setattr(blocked, name, size)
        yield "native" if way in ("tiles", "fixed") else way


def scalar(tau):
    return torch.as_tensor(tau, dtype=F64)


def through(loss_of, tensors, tau, way, upstream, options):
    """The loss and its gradients to the first two tensors, to tau, and to the other tensors."""
    with backend_of(way) as backend:

        def loss(a, b, t, *more):
            return loss_of(a, b, t, *more, backend=backend, **options)

        inputs = (*tensors[:2], scalar(tau), *tensors[2:])
        results = differentiate(loss, inputs, upstream, DEVICE[way])
        if way != "fixed":
            return results
        alone = differentiate(lambda a, b, *more: loss(a, b, scalar(tau), *more), tensors, upstream)
        return [*alone[:3], results[3], *alone[3:]]


def run(z1, z2, tau, backend, upstream=1.0, **options):
    """nt_xent and its gradients to z1, z2 and tau."""
    return through(nt_xent, (z1, z2), tau, backend, upstream, options)


def run_info_nce(query, key, tau, backend, negatives=None, upstream=1.0, **options):
    """info_nce and its gradients to query, key, tau and, where there are some, negatives."""

    def loss(q, k, t, extra=None, **settings):
        return info_nce(q, k, t, negatives=extra, **settings)

    tensors = (query, key) if negatives is None else (query, key, negatives)
    return through(loss, tensors, tau, backend, upstream, options)


def similarities(a, b, tau, dtype):
    """Of unit rows multiplied in `dtype`; at least float32 after that."""
    wide = torch.promote_types(dtype, torch.float32)
    return (F.normalize(a).to(dtype) @ F.normalize(b).to(dtype).T).to(wide) / tau.to(wide)


def truth(z1, z2, tau, dtype=F64, reduction="mean", upstream=1.0):
    """What everybody writes, the whole matrix with its diagonal masked, multiplied in `dtype`: results as of `run`."""

    def loss(a, b, t):
        z = torch.cat([a, b])
        s = similarities(z, z, t, dtype).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        return F.cross_entropy(s, torch.arange(len(z)).roll(len(a)), reduction=reduction)

    return rescaled(loss, (z1.double(), z2.double(), scalar(tau)), upstream, dtype)


def truth_info_nce(
    query, key, tau, negatives=None, dtype=F64, in_batch=True, symmetric=False, reduction="mean", upstream=1.0
):
    """The same for queries against keys: results as of `run_info_nce`."""

    def loss(q, k, t, extra=None):
        s = similarities(q, k, t, dtype)
        label = torch.arange(len(q))
        columns = [s if in_batch else s.diagonal()[:, None]]
        columns += [] if extra is None else [similarities(q, extra, t, dtype)]
        forward = F.cross_entropy(torch.cat(columns, 1), label if in_batch else label * 0, reduction=reduction)
        return (forward + F.cross_entropy(s.T, label, reduction=reduction)) / 2 if symmetric else forward

    inputs = (query, key, scalar(tau)) + (() if negatives is None else (negatives,))
    return rescaled(loss, [x.double() for x in inputs], upstream, dtype)


def errors(got, exact, tau=math.inf):
    """Largest error of each result over the largest element of the exact one (over 1 where that is 0).

    The gradient of tau is a difference of terms as large as loss / tau, and may be small by chance.
    """
    found = []
    for k, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape
        size = b.abs().max().clamp_min(exact[0].abs().max() / tau if k == 3 else 0)
        found.append(((a.double() - b).abs() / (size if size > 1e-12 else 1)).max())
    return torch.stack(found).tolist()


def check(got, exact, room, plain=None, tau=math.inf):
    """Each result errs by at most `room`, plus twice what plain PyTorch errs by in the same dtype; a NaN fails."""
    allowed = [room] * len(got) if plain is None else [room + 2 * error for error in errors(plain, exact, tau)]
    found = errors(got, exact, tau)
    assert all(error <= limit for error, limit in zip(found, allowed, strict=True)), f"{found} exceed {allowed}"

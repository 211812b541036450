"""The fused batch normalisation: values, statistics, gradients, errors; in Triton's interpreter, and on a GPU."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from simclr_fast.models import fused_norm
from simclr_fast.models.fused_norm import batch_norm, supports

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, WORLD = 1e-5, 2
NAMES = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and channels of no round number in one tile, two blocks of channels, and programs with several tiles.
SHAPES = [(5, 3, 3, 1), (7, 5), (3, 130, 2, 3), (5, 64, 7, 8)]
REAL = [(64, 64, 112, 112), (64, 256, 56, 56), (64, 2048, 7, 7), (512, 128), (13, 24, 15, 17), (30, 100, 7, 7)]
CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")  # the rest is compiling, tested below
FLAGS = list(itertools.product([False, True], repeat=2))  # residual, relu


def inputs(shape, dtype=torch.float32, residual=False, bias=True, centre=0.5, spread=1.0):
    """x, weight, bias, residual and dy; no bias and no residual are None."""
    torch.manual_seed(0)
    x, other, dy = (torch.randn(shape) for _ in range(3))
    weight, shift = 1 + 0.3 * torch.randn(shape[1]), 0.3 * torch.randn(shape[1])
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, other, dy = (t.to(DEVICE, dtype).contiguous(memory_format=layout) for t in (centre + spread * x, other, dy))
    return x, weight.to(DEVICE), shift.to(DEVICE) if bias else None, other if residual else None, dy


def plain(x, weight, bias, eps, residual=None, relu=False):
    """PyTorch, operator by operator, in the precision of its arguments."""
    var, mean = torch.var_mean(x.detach().to(weight.dtype), [0, *range(2, x.ndim)], correction=0)
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y, mean, var


def run(function, tensors, relu, **options):
    """All that it gives, and all gradients, by name."""
    *leaves, dy = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, bias, residual = leaves
    y, mean, var = function(x, weight, bias, EPS, residual=residual, relu=relu, **options)
    y.backward(dy.detach())
    values = [y, mean, var, *(None if t is None else t.grad for t in leaves)]
    return {name: t.detach() for name, t in zip(NAMES, values, strict=True) if t is not None}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def check(tensors, relu):
    """No further from float64 than PyTorch in the same precision, and a little: of an output, its last bit."""
    truth = run(plain, [None if t is None else t.double() for t in tensors], relu)
    ours, its = run(batch_norm, tensors, relu), run(plain, tensors, relu)
    assert ours.keys() == truth.keys()
    for name, wanted in truth.items():
        assert ours[name].dtype == its[name].dtype
        error, allowed = ((values[name] - wanted).abs().amax() for values in (ours, its))
        rounding = torch.finfo(ours[name].dtype).eps / (2 if DEVICE == "cuda" else 1)  # the interpreter cuts bits off
        last_bit = max(rounding, 2e-6) * wanted.abs().amax().clamp(min=1)
        assert error <= allowed + last_bit, (name, error, allowed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_exact_than_pytorch(dtype, shape):
    for residual, relu in FLAGS if (dtype, shape) == (torch.bfloat16, SHAPES[-1]) else [(True, True)]:
        check(inputs(shape, dtype, residual), relu)


@pytest.mark.parametrize(("residual", "relu"), FLAGS)
def test_without_bias(residual, relu):
    tensors = inputs((9, 6), residual=residual, bias=False)
    assert "dbias" not in run(batch_norm, tensors, relu)
    check(tensors, relu)


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1, 1)])
def test_of_one_row_bias_and_residual_are_left(shape):
    x, weight, bias, residual, dy = inputs(shape, residual=True)
    got = run(batch_norm, (x, weight, bias, residual, dy), relu=False)
    assert torch.equal(got["mean"], x.flatten())
    assert not got["var"].any()
    assert torch.equal(got["y"], bias.view(shape) + residual)
    assert not got["dx"].any()
    assert not got["dweight"].any()
    assert torch.equal(got["dbias"], dy.flatten())


@pytest.mark.parametrize("first", [0.0, 1e4])
def test_statistics_far_from_zero(first):
    x, *rest = inputs((5, 64, 7, 8), centre=1000.0, spread=0.1)
    x[0, :, 0, 0] += first
    check((x, *rest), relu=False)
    _, mean, var = batch_norm(x, *rest[:2], EPS)
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=2e-4, atol=0)


@pytest.mark.parametrize("most", [1, 3, 1024])
def test_any_number_of_programs(most, monkeypatch):
    from simclr_fast.kernels import batch_norm as kernels

    monkeypatch.setattr(kernels, "splits_of", lambda blocks, tiles, device: min(most, tiles))
    check(inputs((521, 32)), relu=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_are_not_hidden():
    x, weight, bias, *_ = inputs((40, 5))
    x[3, 1], x[5, 2] = torch.nan, torch.inf
    y, mean, var = batch_norm(x, weight, bias, EPS, relu=True)
    for bad in (y.isnan().all(0), var.isnan(), ~mean.isfinite()):
        assert bad.tolist() == [False, True, True, False, False]


def test_layouts_are_kept_and_made():
    x, weight, bias, residual, _ = inputs((4, 6, 5, 3), residual=True)
    x.requires_grad_()
    y, mean, _ = batch_norm(x, weight, bias, EPS, residual=residual.contiguous(), relu=True)
    assert y.stride() == x.stride()
    assert not mean.requires_grad
    (dx,) = torch.autograd.grad(y.mean((2, 3)).sum(), x)  # whose dy has strides of 0
    assert dx.stride() == x.stride()
    again = batch_norm(x, weight, bias, EPS, residual=residual, relu=True)[0]
    assert torch.equal(y, again)
    assert torch.equal(dx, torch.autograd.grad(again, x, torch.full_like(y, 1 / 15))[0])


def test_a_residual_without_relu_gets_the_gradient_itself():
    tensors = inputs((8, 3), residual=True)
    assert torch.equal(run(batch_norm, tensors, relu=False)["dresidual"], tensors[-1])


def test_without_gradients():
    x, weight, bias, *_ = inputs((8, 3))
    weight.requires_grad_()
    wanted = batch_norm(x, weight, bias, EPS)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = batch_norm(x, weight, bias, EPS)[0]
        assert not got.requires_grad
        assert torch.equal(got, wanted)


def test_the_second_derivative_is_refused():
    x, weight, bias, *_ = inputs((8, 3))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(batch_norm(x, weight, bias, EPS)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.parametrize("residual", [False, True])
def test_the_operators_are_registered_as_they_behave(residual):
    x, weight, bias, other, dy = inputs((6, 3, 2, 2), torch.bfloat16, residual)
    for leaf in (x, weight):
        leaf.requires_grad_()
    torch.library.opcheck(fused_norm._forward, (x, weight, bias, other, EPS, True, "", 1), test_utils=CHEAP)
    y, mean, var = batch_norm(x, weight, bias, EPS, residual=other, relu=True)
    saved = (dy, x, y if residual else None, weight, bias, mean, var)
    saved = [t if t is None else t.detach() for t in saved]
    torch.library.opcheck(fused_norm._backward, (*saved, EPS, True, "", 1), test_utils=CHEAP)


def test_compiled_it_gives_the_same_bits():
    compiled = torch.compile(batch_norm, backend="aot_eager", fullgraph=True)
    for residual, relu in FLAGS:
        tensors = inputs((6, 3, 4, 4), torch.bfloat16, residual)
        same_bits(run(compiled, tensors, relu), run(batch_norm, tensors, relu))


def test_what_is_supported():
    x = torch.zeros(4, 6, 5, 3, device=DEVICE)
    rows = x.contiguous(memory_format=torch.channels_last)
    assert supports(rows)
    assert supports(rows.bfloat16())
    assert supports(rows[1:3])
    assert supports(x[:1, :1])
    assert supports(x[:, :, 0, 0].contiguous())
    for wrong in (x, rows[:, :3], rows.double(), rows.long(), rows[:0], x[0], x[:, :, 0, 0].T, rows.to("meta")):
        assert not supports(wrong)


def test_not_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(fused_norm, "INTERPRETED", False)
    assert not supports(torch.zeros(4, 6))


def test_errors_name_the_argument():
    x, weight, bias, residual, _ = inputs((8, 3), residual=True)
    for name, arguments, options in (
        ("x", (x.double(), weight, bias), {}),
        ("x", (x.T, weight, bias), {}),
        ("weight", (x, weight[:2], bias), {}),
        ("weight", (x, weight.bfloat16(), bias), {}),
        ("bias", (x, weight, bias[:, None]), {}),
        ("residual", (x, weight, bias), {"residual": residual[:4]}),
        ("residual", (x, weight, bias), {"residual": residual.bfloat16()}),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got \["):
            batch_norm(*arguments, EPS, **options)


def one_rank(rank, store, results):
    """Its half of the rows over a group, and what that gave."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    x, weight, bias, residual, dy = inputs((8, 5, 3, 3), residual=True, centre=10.0)
    x, residual, dy = (t.chunk(WORLD)[rank] for t in (x, residual, dy))
    for relu in (False, True):
        found[relu] = run(batch_norm, (x, weight, bias, residual, dy), relu, group=dist.group.WORLD)
    torch.save(found, f"{results}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="Gloo's ranks are on CPUs")
def test_ranks_of_a_group_are_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, (tmp_path / "store", tmp_path), WORLD)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(WORLD)]
    for relu in (False, True):
        alone = run(batch_norm, inputs((8, 5, 3, 3), residual=True, centre=10.0), relu)
        for name, wanted in alone.items():
            parts = [found[relu][name] for found in ranks]
            if name in ("mean", "var"):
                assert torch.equal(*parts)
            joined = {"mean": parts[0], "var": parts[0], "dweight": sum(parts), "dbias": sum(parts)}
            torch.testing.assert_close(joined.get(name, torch.cat(parts)), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_real_sizes_on_a_gpu(dtype, shape):
    for residual, relu in FLAGS:
        tensors = inputs(shape, dtype, residual)
        check(tensors, relu)
        same_bits(run(batch_norm, tensors, relu), run(batch_norm, tensors, relu))

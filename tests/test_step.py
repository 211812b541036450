"""The trainer's step: chunks against the whole batch, randomness replayed, steps that are skipped, no host waits."""

import pytest
import torch
from torch import nn

from simclr_fast.config import ConfigError
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.optim import LARS, Schedule, lars_param_groups
from simclr_fast.training.step import METRICS, Step, even

CFG = Config(arch="resnet8", width=0.25, image_size=16, batch=12, head_features=16)


def views(images, seed=0):
    shape = 2, images, 3, 16, 16
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(batch, chunks):
    """As a rank gets them: of each chunk the first views, then the second ones."""
    return [part.flatten(0, 1) for part in batch.chunk(chunks, dim=1)]


def built(make=Method, **options):
    torch.manual_seed(0)
    method = make(CFG).double()
    optimizer = LARS(lars_param_groups(method, 1e-4), lr=0.0, trust_coefficient=0.02)
    return method, Step(method, optimizer, Schedule(1.0, 2, 10), batch=CFG.batch, **options)


def after(make=Method, steps=3, chunks=1, **options):
    method, step = built(make, accumulate=chunks, **options)
    for number in range(1, steps + 1):
        metrics = step(number, parts(views(CFG.batch, number), chunks))
    return method.state_dict(), metrics


def assert_equal(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-13, msg=name)


class Learnt(Method):
    """With a temperature that is learnt, outside the network."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.temperature = nn.Parameter(torch.tensor(0.2))
        self.loss_parameters = (self.temperature,)


class Noisy(Method):
    """With dropout, which draws at random."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.head.insert(0, nn.Dropout(0.5))


class Without(Method):
    """Without BatchNorm."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.encoder, self.head = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.Tanh()), nn.Linear(16, 8)


@pytest.mark.parametrize("chunks", [2, 3, 12])
def test_chunks_learn_what_the_whole_batch_does_without_batchnorm(chunks):
    assert_equal(after(Without, chunks=chunks)[0], after(Without)[0])


@pytest.mark.parametrize("make", [Method, Learnt])
@pytest.mark.parametrize(("chunks", "bn_images"), [(2, 6), (3, 4), (2, 3)])
def test_chunks_learn_what_the_whole_batch_does_with_the_same_blocks(make, chunks, bn_images):
    found, metrics = after(make, chunks=chunks, bn_images=bn_images)
    expected, whole = after(make, bn_images=bn_images)
    assert_equal(found, expected)
    torch.testing.assert_close(metrics, whole)
    if make is Learnt:
        assert found["temperature"] != 0.2


def test_blocks_make_a_difference():
    whole, blocks = after()[0], after(bn_images=6)[0]
    assert not torch.allclose(whole["encoder.conv1.weight"], blocks["encoder.conv1.weight"], rtol=1e-4)


def test_what_a_network_draws_is_replayed():
    """Against the gradient of the chunks' own graphs, all held at once."""
    method, step = built(Noisy, accumulate=3)
    batch = parts(views(CFG.batch), 3)
    step.optimizer.step = lambda: None
    step(1, iter(batch))
    found = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    z = [step._embeddings(part, 1, k) for k, part in enumerate(batch)]
    z1, z2 = (torch.cat(rows) for rows in zip(*(rows.chunk(2) for rows in z), strict=True))
    method.loss(z1, z2)[0].backward()
    for one, p in zip(found, method.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-10, atol=1e-14)
    other = step._embeddings(batch[0], 2, 0)
    assert not torch.allclose(other, z[0])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(chunks, bad):
    method, step = built(accumulate=chunks)
    step(1, parts(views(CFG.batch), chunks))
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    velocity = [state["momentum_buffer"].clone() for state in step.optimizer.state.values()]
    spoilt = views(CFG.batch, 1)
    spoilt[0, 5, 0, 3, 3] = bad
    metrics = dict(zip(METRICS, step(2, parts(spoilt, chunks)).tolist(), strict=True))
    assert metrics["skipped"] == 1
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for old, state in zip(velocity, step.optimizer.state.values(), strict=True):
        assert torch.equal(old, state["momentum_buffer"])
    metrics = dict(zip(METRICS, step(3, parts(views(CFG.batch, 2), chunks)).tolist(), strict=True))
    assert metrics["skipped"] == 0
    assert not torch.equal(method.state_dict()["encoder.conv1.weight"], before["encoder.conv1.weight"])


def test_a_gradient_that_is_not_finite_skips_the_step_although_the_loss_is():
    method, step = built()
    method.encoder.conv1.weight.register_hook(lambda grad: grad / 0)
    metrics = dict(zip(METRICS, step(1, parts(views(CFG.batch), 1)).tolist(), strict=True))
    assert metrics["skipped"] == 1
    assert metrics["loss"] > 0


def test_metrics_are_those_of_the_embeddings():
    method, step = built()
    batch = views(CFG.batch)
    with step.scope.set_to("ignore"):
        z1, z2 = method(batch.flatten(0, 1)).chunk(2)
    loss, stats = method.loss(z1, z2)
    found = dict(zip(METRICS, step(1, parts(batch, 1)).tolist(), strict=True))
    assert found["loss"] == pytest.approx(loss.item())
    assert found["contrastive_top1"] == pytest.approx(stats["contrastive_top1"].item())
    unit = nn.functional.normalize(torch.cat([z1, z2]))
    assert found["embedding_spread"] == pytest.approx(1 - unit.mean(0).square().sum().item(), rel=1e-5)
    assert 0 < found["embedding_spread"] < 1


def test_graphs_are_not_replayed_over_several_chunks():
    with pytest.raises(ConfigError, match="compile must be off or default for accumulate=2, got compile=reduce-over"):
        built(accumulate=2, compiled="reduce-overhead")


@pytest.mark.slow
def test_compiled_it_learns_the_same_and_compiles_no_chunk_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, _ = after(steps=2, chunks=4, bn_images=3, compiled="default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    expected, _ = after(steps=2, bn_images=3)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("batch", "world", "chunks", "images", "expected"),
    [
        (64, 1, 1, 64, (1, 1)),
        (64, 4, 2, 32, (1, 4)),
        (64, 4, 2, 16, (1, 2)),
        (64, 4, 2, 4, (2, 1)),
        (64, 4, 1, 16, (1, 1)),
    ],
)
def test_blocks_lie_within_ranks_or_over_whole_ones(batch, world, chunks, images, expected):
    assert even(batch, world, chunks, images) == expected


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ((64, 3, 1, 64), "batch must be divisible by processes x accumulate, got batch=64, processes=3, accumulate=1"),
        ((64, 1, 3, 64), "accumulate=3"),
        ((64, 4, 2, 12), r"bn_chunk must divide the 8 images .*divides those of all, 32, got 12; near it: .*\b8, 16\b"),
    ],
)
def test_what_does_not_come_out_even_is_refused(numbers, match):
    with pytest.raises(ConfigError, match=match):
        even(*numbers)

"""The memory of a step as it is counted beforehand, against what real steps take; and the chunk that is chosen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.models import fused_norm, projection_head, resnet
from simclr_fast.models.batchnorm import share_scope
from simclr_fast.training import memory
from simclr_fast.training.memory import Memory, estimate, largest_chunk, loss_bytes, rehearse, room_on, tries

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm as it runs on a CPU outside of the tests of its kernel."""
    monkeypatch.setattr(fused_norm, "INTERPRETED", False)


def built(arch: str, stem: str = "small") -> nn.Sequential:
    encoder = resnet(arch, stem=stem)
    head = projection_head("nonlinear", encoder.num_features)
    return nn.Sequential(encoder, head).to(memory_format=torch.channels_last)


def saved_bytes(method: nn.Module, views: Tensor, half: bool) -> int:
    """What autograd saves in a real forward pass, each memory once, beside weights, buffers and views."""
    held = {x.untyped_storage().data_ptr() for x in (*method.parameters(), *method.buffers(), views)}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes(), x
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        method(views)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(
    ("arch", "stem", "size", "views", "pieces", "half"),
    [
        ("resnet18", "small", 16, 16, 1, False),
        ("resnet18", "small", 16, 16, 2, True),
        ("resnet50", "imagenet", 64, 8, 1, True),
    ],
)
def test_as_many_activations_are_counted_as_autograd_saves(arch, stem, size, views, pieces, half):
    method = built(arch, stem)
    counted = rehearse(method, size, views, autocast=torch.bfloat16 if half else None, pieces=pieces)
    share_scope(method).pieces = pieces
    images = torch.randn(views, 3, size, size).contiguous(memory_format=torch.channels_last)
    assert counted.activations == pytest.approx(saved_bytes(method, images, half), rel=0.01)


def test_a_rehearsal_leaves_the_network_and_the_random_state_alone():
    method = built("resnet18")
    before = {name: x.clone() for name, x in method.state_dict().items()}
    state = torch.get_rng_state()
    rehearse(method, 32, 4)
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())
    assert all(weight.grad is None for weight in method.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_operations_are_those_of_the_products():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 4 * 4, 5, bias=False))
    found = rehearse(layers, 4, 2)
    convolution, linear = 2 * 2 * (4 * 4) * 8 * 3 * 9, 2 * 2 * (8 * 4 * 4) * 5
    assert found.forward_flop == convolution + linear
    assert found.flop == 2 * convolution + 3 * linear  # views need no gradient
    assert found.features == 5


def test_memory_of_a_step_is_added_up():
    layer = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5, bias=False))
    found = estimate(layer, 4, 6, chunks=2, world=3)
    weights, embeddings = 4 * 48 * 5, 4 * 12 * 5
    assert found.model == 3 * weights  # the weights, gradients, velocity
    assert found.views == 4 * 12 * 48
    assert found.activations == 4 * 6 * 48 + embeddings // 2  # of a chunk, whose flat views are a copy
    assert found.loss == 3 * embeddings + 3 * embeddings + 4 * 4 * 3 * 12 + memory.LOSS_TILES
    assert found.total == found.indivisible + found.activations + found.workspace


def test_more_chunks_leave_fewer_activations():
    method = built("resnet18")
    one, four = (estimate(method, 16, 64, chunks=chunks) for chunks in (1, 4))
    assert 3 < one.activations / four.activations < 4  # what is saved of the weights stays
    assert one.indivisible == four.indivisible


def test_the_losss_memory_is_that_of_the_bench():
    lines = map(json.loads, (ROOT / "bench" / "results" / "loss.jsonl").read_text().splitlines())
    points = [line for line in lines if line["contender"] == "simclr_fast" and line.get("2N", 0) >= 8192]
    assert points
    for line in points:
        inputs_and_gradients = 2 * 4 * line["2N"] * line["D"]
        counted = loss_bytes(line["2N"] // 2, 1, line["D"]) - inputs_and_gradients
        assert counted == pytest.approx(line["extra_bytes"], rel=0.2), line["2N"]


def test_a_measured_peak_is_the_sum():
    counted = Memory(model=10, activations=50, views=5, loss=5, workspace=7)
    assert counted.total == 77
    for peak, activations, workspace in ((90, 50, 20), (60, 40, 0)):
        found = counted.with_peak(peak)
        assert found.measured
        assert (found.total, found.activations, found.workspace) == (peak, activations, workspace)


@pytest.mark.parametrize("images", [1, 2, 12, 97, 360, 4096])
def test_the_fewest_chunks_that_fit_are_found_in_few_trials(images):
    divisors = [chunks for chunks in range(1, images + 1) if images % chunks == 0]
    for most in {1, 2, 3, images // 2 + 1, images}:
        asked: list[int] = []
        found = largest_chunk(
            lambda chunks, most=most, asked=asked: asked.append(chunks) or images // chunks <= most, images
        )
        assert found == next(chunks for chunks in divisors if images // chunks <= most)
        assert len(asked) == len(set(asked)) <= 2 * len(divisors).bit_length()
        assert asked[0] == 1


def test_images_that_do_not_fit_singly_are_refused():
    with pytest.raises(ConfigError, match="image by image, 12 to a process"):
        largest_chunk(lambda chunks: False, 12)


def test_a_trial_that_runs_out_of_memory_does_not_fit():
    def step(chunks: int) -> None:
        if chunks < 4:
            raise torch.OutOfMemoryError("not enough")

    assert largest_chunk(tries(step), 16) == 4


def test_another_error_of_a_trial_goes_through():
    def step(chunks: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        tries(step)(1)


def test_ranks_of_a_cpu_share_half_of_what_is_free():
    assert room_on(torch.device("cpu"), 1000, ranks=2) == 250


@pytest.mark.gpu
def test_on_a_gpu_the_counted_memory_is_close_to_the_measured():
    device = torch.device("cuda")
    method = built("resnet18").to(device)
    views = torch.randn(512, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        method(views).square().mean().backward()

    step()  # the libraries' own memory
    before = torch.cuda.memory_allocated()
    peak = memory.measured_peak(step, device) - before
    counted = rehearse(method, 32, 512)
    assert peak == pytest.approx(counted.activations + counted.workspace, rel=0.25)


@pytest.mark.gpu
def test_a_gpus_memory_limits_the_chunk():
    total = torch.cuda.get_device_properties(0).total_memory
    assert (
        largest_chunk(tries(lambda chunks: torch.empty(2 * total // chunks, dtype=torch.uint8, device="cuda")), 16) == 4
    )
    assert 0 < room_on(torch.device("cuda", 0), 0) < total


RESIDENT = """
import ctypes, gc, re
from pathlib import Path
import torch
from simclr_fast.models import fused_norm, projection_head, resnet
from simclr_fast.training.memory import rehearse

def status():
    found = re.findall(r"^(\\w+):\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return {key: int(kib) * 1024 for key, kib in found}

def step(views):
    z = method(views)
    z.backward(torch.ones_like(z))

torch.set_num_threads(1)
encoder = resnet("resnet18", stem="small")
method = torch.nn.Sequential(encoder, projection_head("nonlinear", 512)).to(memory_format=torch.channels_last)
step(torch.randn(4, 3, 32, 32))  # gradients and libraries
counted = rehearse(method, 32, 128)
views = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status()
step(views)
after = status()
resident = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])
print(resident / (counted.activations + counted.workspace))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_takes_about_the_resident_memory_that_was_counted():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.95 < float(done.stdout) < 1.3

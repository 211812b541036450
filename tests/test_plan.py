"""The plan of a run: its arithmetic against values worked out by hand, its page, and what it refuses."""

import dataclasses
import json

import pytest

from simclr_fast import methods
from simclr_fast.config import ConfigError
from simclr_fast.optim import Schedule
from simclr_fast.training import costs
from simclr_fast.training.costs import Network, Speed, all_reduced, bench_speed, run_speed, traffic
from simclr_fast.training.memory import Memory
from simclr_fast.training.plan import Plan, clock

GIB = 2**30
# Hand-made: 1 M parameters and two BatchNorm layers.
SMALL = Network(900_000, 100_000, 4_000_000, (64, 128), 128, 2_000_000, 6_000_000)
HELD = Memory(model=GIB, activations=8 * GIB, views=GIB, loss=GIB, workspace=GIB)


def planned(**changes) -> Plan:
    simclr = methods.load("simclr")
    cfg = simclr.Config(arch="resnet50", batch=4096, epochs=100, accumulate="1")
    facts = {
        "cfg": cfg, "network": SMALL, "data": "photos: 1,281,167 training images", "images": 1_281_167,
        "schedule": Schedule(4.8, 3127, 31279), "device": "NVIDIA H200", "on_gpu": True, "precision": "bf16",
        "memory": HELD, "room": 100 * GIB, "bn_images": 4096, "norm_ranks": 8, "world": 8,
    }  # fmt: skip
    return Plan(**(facts | changes))


def test_a_ring_sends_nearly_twice_what_is_reduced():
    assert [all_reduced(1000, ranks) for ranks in (1, 2, 4, 8)] == [0, 1000, 1500, 1750]


def test_what_is_sent_in_a_step():
    sizes = {"world": 4, "gradients": 30 << 20, "batch": 64, "features": 128, "channels": [64, 128]}
    found = {part.what: part[1:] for part in traffic(**sizes, norm_ranks=4)}
    assert found["gradients"] == (2, 3 * (30 << 20) // 2)
    assert found["embeddings"] == (2, 96 * 4 * 129)  # three quarters of 128 rows, and their log-sum-exp
    assert found["BatchNorm"] == (4, 2 * 3 * (2 * 8 * (64 + 128)) // 2)  # mean and variance, forward and backward
    assert "running statistics" not in found
    assert found["flags"] == (1, 24)
    assert {part.what: part.sent for part in traffic(**sizes, feature_bytes=2)}["embeddings"] == 96 * (2 * 128 + 4)
    assert traffic(**(sizes | {"world": 1})) == []


def test_chunks_and_groups_change_batchnorms_messages():
    sizes = {"world": 4, "gradients": 4, "batch": 64, "features": 128, "channels": [64, 128]}
    messages = {
        (chunks, ranks): {part.what: part.messages for part in traffic(**sizes, chunks=chunks, norm_ranks=ranks)}
        for chunks, ranks in ((3, 4), (1, 2), (1, 1))
    }
    assert messages[3, 4]["BatchNorm"] == 2 * (3 + 2 + 3)  # forward, the first two again, backward
    assert messages[1, 2]["BatchNorm"] == 4
    assert messages[1, 2]["running statistics"] == 1
    assert "BatchNorm" not in messages[1, 1]


def test_operations_of_a_step_and_of_the_loss():
    assert costs.step_flop(SMALL, 1) == 6_000_000
    assert costs.step_flop(SMALL, 4) == 6_000_000 + 1_500_000
    assert costs.loss_flop(4096, 128) == 26 * 4096**2 * 128


def test_a_network_is_counted():
    simclr = methods.load("simclr")
    cfg = simclr.Config(**simclr.PRESETS["shapes"])
    method = simclr.Method(cfg)
    found = costs.network(method, cfg.image_size)
    assert found.encoder + found.head == sum(p.numel() for p in method.parameters()) == found.gradients // 4
    assert (
        len(found.channels) == 11
    )  # the stem's; two and a shortcut's in each of three blocks, but the first; the head's
    assert found.features == 64
    assert found.forward_flop < found.flop < 3 * found.forward_flop


def test_seconds_of_a_step_and_of_its_communication():
    run = planned(speed=Speed(1024.0, "bench", whole=False))
    sent = sum(part.sent for part in run.traffic)
    assert run.sending_s == pytest.approx(sent / 450e9)
    assert run.step_s == pytest.approx(0.5 + sent / 450e9)  # 512 images of a GPU
    assert dataclasses.replace(run, hosts=2).sending_s == pytest.approx(sent / 50e9)
    assert dataclasses.replace(run, link=10.0).sending_s == pytest.approx(sent / 10e9)
    assert dataclasses.replace(run, on_gpu=False).sending_s is None
    chunked = dataclasses.replace(run, chunks=2)
    assert chunked.step_s - chunked.sending_s == pytest.approx(0.5 * 7 / 6)
    assert dataclasses.replace(run, speed=Speed(8192.0, "run", whole=True)).step_s == 0.5
    assert planned().step_s is None


def test_the_bench_of_this_device_and_network_nearest_in_batch_is_taken(tmp_path):
    def line(batch, speed, **changes):
        case = {"device": "NVIDIA H200", "arch": "resnet50", "image_size": 224, "precision": "bf16"}
        case |= {"contender": "simclr_fast", "data": "synthetic", "ranks": 1}
        return case | {"batch": batch, "images_per_s": {"p50": speed}} | changes

    lines = [
        line(64, 1.0), line(256, 2.0, date="2026-01-02"), line(512, 3.0), line(500, 4.0, device="NVIDIA A100"),
        line(500, 5.0, contender="plain"), line(500, 6.0, arch="resnet18"), line(500, 7.0, precision="fp32"),
        line(500, 8.0, image_size=96), {"contender": "simclr_fast"}, line(500, 9.0, status="out of memory"),
        line(500, 10.0, data="photos"), line(500, 11.0, ranks=2),
    ]  # fmt: skip
    path = tmp_path / "step.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    case = {"device": "8 x NVIDIA H200", "arch": "resnet50", "width": 1.0, "image_size": 224, "precision": "bf16"}
    case |= {"path": path}
    assert bench_speed(**case, images=600).images_per_s == 3.0
    found = bench_speed(**case, images=200)
    assert found == Speed(2.0, "step.jsonl, 2026-01-02, batch 256", whole=False)
    assert bench_speed(**(case | {"device": "NVIDIA H100"}), images=200) is None
    assert bench_speed(**(case | {"path": tmp_path / "none"}), images=200) is None
    assert bench_speed(**(case | {"width": 2.0}), images=200) is None


def test_a_run_knows_its_own_speed():
    assert run_speed([{"step": 1}]) is None
    assert run_speed([{"images_per_s": x} for x in (1.0, 30.0, 20.0)]).images_per_s == 20.0


def test_a_step_that_does_not_fit_is_refused_with_what_to_change():
    planned().refuse()
    with pytest.raises(ConfigError, match=r"12.00 GiB for each GPU, of 11.00 GiB.*--accumulate auto.*batch=4096"):
        planned(room=11 * GIB).refuse()
    with pytest.raises(ConfigError, match=r"alone take 3.00 GiB.*cannot help: give a smaller --batch"):
        planned(room=2 * GIB).refuse()


def test_the_page_has_two_columns_and_short_lines():
    lines = planned(speed=Speed(1024.0, "step.jsonl", whole=False), chunks=4, step=279).lines()
    page = "\n".join(lines)
    assert max(map(len, lines)) <= 120
    column = lines[0].index("photos")
    assert all(line[:column].strip() and line[column - 2 : column] == "  " for line in lines if line)
    for text in (
        "lr 4.8 = 0.3 x 4096/256",
        "31,279 = 1,281,167 x 100 epochs / 4,096 + 1",
        "for each GPU 512 images, in 4 chunks of 128",
        "from step 279 on",
        "12.00 GiB of 100.00 GiB",
        "at 450 GB/s",
        "of a step if nothing hides it",
        "for 31,000 steps of",
    ):
        assert text in page, text


def test_the_page_says_what_is_not_known():
    page = "\n".join(planned(world=1, norm_ranks=1, on_gpu=False, device="a CPU").lines())
    assert "none: one process" in page
    assert "not known: no such step was measured on this device" in page
    assert "python bench/step_bench.py --arch resnet50 --image-size 224" in page
    assert "estimated" in page
    cfg = dataclasses.replace(planned().cfg, arch="resnet50", width=2.0)
    assert "begin the run: once it has records" in "\n".join(planned(cfg=cfg).lines())
    measured = planned(memory=HELD.with_peak(14 * GIB)).lines()
    assert any("measured on one step" in line for line in measured)
    assert any("14.00 GiB" in line for line in measured)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (40, "40 s"), (59.7, "1 min 0 s"), (3560, "59 min 20 s"), (7500, "2 h 5 min"), (2e5, "2 d 8 h")],
)
def test_a_time_is_told_in_two_units(seconds, text):
    assert clock(seconds) == text

"""Runs of the training command on a few tiny images, for the tests that look at them."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast import checkpoint, train
from simclr_fast.record import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--arch", "resnet8", "--width", "0.125", "--image-size", "16", "--batch", "16", "--epochs", "3", "--gpus", "0",
         "--head-features", "16", "--blur", "0", "--precision", "fp32")  # fmt: skip


def jpeg(seed, size=20, mode="RGB"):
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size)).convert(mode)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(jpeg(1000 * label + number + (split == "test") * 100))
    return root


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks on several threads wait for each other, long so where other programs run beside."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield
    torch.set_num_threads(before)


def run(images, out, *flags):
    return train.main(["--data", str(images), "--out", str(out), *SMALL, *flags])


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(images, out) == 0
    return out


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(images, out, "--epochs", "1") == 0
    return out


def command(images, out, *flags):
    return [sys.executable, "-m", "simclr_fast.train", "--data", str(images), "--out", str(out), *SMALL, *flags]


def weights(out):
    state = checkpoint.read(out / "checkpoints" / "last.pt")
    return {f"{part}.{name}": tensor for part in ("method",) for name, tensor in state[part].items()} | {
        f"velocity.{number}": entry["momentum_buffer"] for number, entry in state["optimizer"]["state"].items()
    }


def assert_same_bits(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def untimed(out):
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait")} for r in read_metrics(out)]

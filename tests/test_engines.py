"""The choice of the engine, pixels held on the device, and what is advised when the input is short."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.data import Policy, Settings, Split, choose, engine_name, eval_images, train_views
from simclr_fast.data.engines import resident, tune
from simclr_fast.data.engines.choice import preload
from simclr_fast.data.engines.tune import Waits

CPU = torch.device("cpu")


def held(n: int = 30, height: int = 20, width: int = 24) -> Split:
    """A set that is an array."""
    rng = np.random.default_rng(0)
    return Split(
        names=[str(k) for k in range(n)],
        paths=["array"] * n,
        offsets=np.zeros(n, np.int64),
        lengths=np.zeros(n, np.int64),
        sizes=np.tile((height, width), (n, 1)),
        labels=None,
        pixels=rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8),
    )


def views(split: Split, engine: str, **options) -> list:
    policy = Policy(16, dialect=options.pop("dialect", "torchvision"))
    return list(train_views(split, policy, batch=10, seed=0, start_step=0, steps=4, engine=engine, **options))


def test_small_images_that_fit_are_held(monkeypatch: pytest.MonkeyPatch):
    split = held()
    name, said = choose("auto", split, CPU)
    assert (name, said) == (
        "resident",
        "all 30 images (0 MiB of pixels) are held on cpu: nothing is decoded during training",
    )
    large = held(2, 200, 10)
    assert choose("auto", large, CPU)[0] == engine_name("auto")[0]
    assert choose("resident", large, CPU)[0] == "resident"
    assert choose("torchvision", split, CPU)[0] == "torchvision"
    monkeypatch.setattr(resident, "CPU_SHARE", 0)
    assert choose("auto", split, CPU)[0] == "resident"  # it is there already
    split = dataclasses.replace(split, pixels=None)
    assert choose("auto", split, CPU)[0] == engine_name("auto")[0]
    with pytest.raises(
        ValueError,
        match="must hold all 30 images .*, each in a box of the largest sides, 20 x 24, in 0 MiB on cpu, which",
    ):
        choose("resident", split, CPU)


def test_room_is_shared_by_the_ranks_of_a_host():
    assert resident.room_on(CPU, 4) * 3 < resident.room_on(CPU)


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
def test_every_engine_makes_the_same_views_of_an_array(dialect: str):
    split = held()
    truth = views(split, "torchvision", workers=0, dialect=dialect)
    for engine in {"resident", engine_name("auto")[0]} - {"torchvision"}:
        for one, other in zip(views(split, engine, dialect=dialect), truth, strict=True):
            assert np.array_equal(one[2], other[2])
            torch.testing.assert_close(one[0], other[0], atol=2e-4, rtol=0)
            torch.testing.assert_close(one[1], other[1], atol=2e-4, rtol=0)


def test_held_pixels_without_compiled_code(monkeypatch: pytest.MonkeyPatch):
    split = held()
    expected = views(split, "resident")
    monkeypatch.setattr(resident, "HAS_NUMBA", False)
    for one, other in zip(views(split, "resident"), expected, strict=True):
        torch.testing.assert_close(one[0], other[0], atol=2e-4, rtol=0)


def test_workers_and_type(monkeypatch: pytest.MonkeyPatch):
    split = held()
    one, many = (views(split, "resident", settings=Settings(workers)) for workers in (1, 5))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, many, strict=True))
    half = views(split, "resident", dtype=torch.bfloat16)[0][0]
    assert torch.equal(half, one[0][0].bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_files_are_decoded_once_for_all_uses(shared: Path, monkeypatch: pytest.MonkeyPatch):
    from simclr_fast.data import open_dataset

    photos = open_dataset(str(shared / "data" / "photos-256.tar")).train
    fields = {f.name: getattr(photos, f.name) for f in dataclasses.fields(photos)}
    few = Split(**{k: v[:6] if v is not None else None for k, v in fields.items()})
    list(eval_images(few, Policy(16), batch=4, engine="resident"))
    monkeypatch.setattr(Split, "read", lambda *_: pytest.fail("read again"))
    made = list(eval_images(few, Policy(16), batch=4, engine="resident"))
    monkeypatch.undo()
    other = list(eval_images(few, Policy(16), batch=4, engine="torchvision", workers=0))
    for one, two in zip(made, other, strict=True):
        torch.testing.assert_close(one[0], two[0], atol=3e-3, rtol=0)


def test_pixels_are_decoded_before_the_first_view_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    split, decoded = dataclasses.replace(held(), pixels=None), []
    made = np.zeros((30, 20, 24, 3), np.uint8)
    monkeypatch.setattr(resident, "_decoded", lambda *_: decoded.append(1) or (made, {}))
    preload("torchvision", split, CPU, Settings())
    assert decoded == []
    preload("auto", split, CPU, Settings())
    assert decoded == [1]
    views(split, "auto")
    assert decoded == [1]


def test_the_fewest_threads_that_are_nearly_the_fastest():
    rates = {1: 50, 2: 99, 4: 100, 5: 98, 8: 90}
    best, found = tune.tuned(Settings(), lambda s: rates[s.workers], 4, False)
    assert best.workers == 2
    assert found == {"1 workers": 50, "2 workers": 99, "4 workers": 100, "5 workers": 98, "8 workers": 90}
    best, _ = tune.tuned(Settings(), lambda s: s.workers * (1 - abs(s.hardware - 0.8)), 4, True)
    assert (best.workers, best.hardware) == (8, 0.8)


def waited(wait: float, *, read: float = 0, busy: bool = False, workers: int = 64) -> Waits:
    waits = Waits(Settings(workers))
    waits.add(9)  # the first is not counted
    waits.start()
    waits.add(wait)
    waits._seconds, waits._read, waits._cpu = 1, read, 10**6 * busy
    return waits


@pytest.mark.parametrize(
    ("waits", "engine", "expected"),
    [
        (waited(0.05), "dali", ""),
        (waited(0.5, read=40), "dali", "50% of the time: the disk is short"),
        (waited(0.2), "torchvision", "20% of the time: this is the slow engine"),
        (waited(0.2, busy=True), "dali", "cores are busy: more cores, or a GPU, help; large files decode faster"),
        (waited(0.2, busy=True), "resident", "cores are busy: more cores, or a GPU, help"),
        (waited(0.2, workers=1), "dali", "1 of 16 cores prepare images; raise --workers"),
        (waited(0.2), "dali", "--tune-input finds"),
    ],
)
def test_advice_names_what_is_short(waits: Waits, engine: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "cores", lambda: 16)
    advice = waits.advice(engine, CPU)
    assert expected in advice
    assert bool(advice) == bool(expected)


def test_reading_is_timed():
    settings = Settings()
    settings.meter.add("reading", time.perf_counter() - 1)
    assert settings.meter.reading >= 1


SHARD = """
import hashlib, sys
from simclr_fast.data import Policy, open_dataset, train_views
data, rank, world = sys.argv[1], *map(int, sys.argv[2:])
split = open_dataset(data).train
for one, two, indices in train_views(split, Policy(16), batch=8, seed=5, start_step=3, steps=6, rank=rank, world=world):
    for row in range(len(indices)):
        digest = hashlib.sha256(one[row].numpy().tobytes() + two[row].numpy().tobytes()).hexdigest()
        print(indices[row], digest)
"""


def test_two_processes_make_the_views_of_one(tmp_path: Path):
    rng = np.random.default_rng(0)
    for k in range(20):  # of other sizes than what is held
        Image.fromarray(rng.integers(0, 256, (30 + k, 150, 3), dtype=np.uint8)).save(tmp_path / f"{k}.jpg")

    def lines(rank: int, world: int) -> subprocess.Popen:
        command = [sys.executable, "-c", SHARD, tmp_path, str(rank), str(world)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    started = [lines(0, 1), lines(0, 2), lines(1, 2)]
    whole, *halves = ([*process.communicate()[0].splitlines()] for process in started)
    assert len(whole) == 48
    batches = [half[4 * step : 4 * step + 4] for step in range(6) for half in halves]
    assert whole == [line for batch in batches for line in batch]
    passes = [line.split()[0] for line in whole][16:]  # 24 places into a stream of 20 images: its third pass
    assert len(set(passes[:20])) == 20


@pytest.mark.gpu
def test_pixels_held_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    split = held()
    on_gpu, on_cpu = views(split, "resident", device="cuda"), views(split, "resident")
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one[0].is_cuda
        torch.testing.assert_close(one[0].cpu(), other[0], atol=1e-3, rtol=0)
        assert np.array_equal(one[2], other[2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = train_views(split, Policy(16), batch=10, seed=0, start_step=0, steps=2, engine="resident", device="cuda")
        next(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")

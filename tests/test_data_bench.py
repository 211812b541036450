"""The bench of the input on tiny images: what it writes, what it says of who is missing, what it counts and refuses."""

import json
import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import data_bench

    return data_bench


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """12 JPEGs of different sizes, in two classes."""
    rng = np.random.default_rng(0)
    for k in range(12):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + k, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def work(bench: ModuleType, images: Path, tmp_path: Path):
    split = bench.open_dataset(str(images), 1).train
    files = bench.as_files(split, tmp_path / "files")
    return bench.Work(split, files, str(tmp_path / "files"), bench.policy_for(24), 4, 1, "cpu")


def test_results_and_missing_packages(bench, images, monkeypatch, tmp_path, capsys):
    """Whole, with a process for each contender."""
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr("_data_contenders.find_spec", lambda name: None)  # as if no peer were installed
    file = tmp_path / "data.jsonl"
    flags = ["--device", "cpu", "--quick", "--size", "24", "--batch", "4", "--images", "8", "--workers", "1"]
    code = bench.main([str(images), *flags, "--only", "v2, PIL", "FFCV", "--stages", "--json", str(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 0
    assert all(line["device"] and line["commit"] and line["size"] == 24 and line["peers"] for line in lines)
    measured = {line["contender"]: line for line in lines if "images_per_s" in line}
    assert set(measured) == {"simclr_fast dali", "torchvision v2, PIL"}
    for line in measured.values():
        assert line["status"] == "ok"
        assert (line["images"], line["batch"], line["workers"]) == (12, 4, 1)
        assert len(line["raw_images_per_s"]) == 2
        assert 0 < line["images_per_s"]["p20"] <= line["images_per_s"]["p50"] <= line["images_per_s"]["p80"]
        assert line["views_per_s"] == 2 * line["images_per_s"]["p50"]
        assert line["cpu_ms"]["p50"] > 0
        assert line["memory_mib"]["p50"] > 10
        assert line["first_batch_s"]["p50"] > 0
    assert measured["simclr_fast dali"]["ours_over_it"]["p50"] == 1
    assert measured["torchvision v2, PIL"]["processes"] == 2
    stages = {(line["contender"], line["stage"]): line["cpu_ms"]["p50"] for line in lines if "stage" in line}
    assert len(stages) == 16
    assert stages["simclr_fast, CPU", "sum"] > stages["simclr_fast, CPU", "crop, resize"] > 0
    assert stages["torchvision v2, PIL", "blur"] == 0  # small images are not blurred
    shown = capsys.readouterr().out
    assert "FFCV: not installed" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("name", ["simclr_fast torchvision", "simclr_fast resident", "torchvision v2, tensors"])
def test_contenders_make_two_views_without_end(bench, work, name):
    from _data_process import Gauge, Window, measured

    contender = next(c for c in bench.EVERY if c.name == name)
    stream = contender.start(bench.replace(work, workers=0), 1)
    taken = measured(stream, work, contender.views, Window(8, 0), Gauge("cpu"))
    assert taken.images_per_s > 0
    assert taken.first_batch_s > 0


@pytest.mark.parametrize("name", ["DALI, color_twist", "DALI, decode alone"])
def test_graphs(bench, work, name):
    pytest.importorskip("nvidia.dali")
    from _data_process import Gauge, measured

    contender = next(c for c in bench.EVERY if c.name == name)
    large = bench.replace(work, policy=bench.replace(bench.policy_for(80), blur_p=1.0))
    assert measured(contender.start(large, 1), large, contender.views, None, Gauge("cpu")).images_per_s > 0


def test_another_batch_than_was_asked_for_is_refused(bench, work):
    from _data_process import check

    def view(*shape, value=None):
        return torch.randn(shape).clamp(-1.5, 1.5) if value is None else torch.full(shape, float(value))

    check([view(4, 3, 24, 24), view(4, 3, 24, 24)], work, 2)
    check([], work, 0)
    for wrong in (
        [view(4, 3, 24, 24)],
        [view(4, 3, 24, 24), view(4, 3, 24, 25)],
        [view(4, 3, 24, 24), view(4, 3, 24, 24).double()],
        [view(4, 3, 24, 24), view(4, 3, 24, 24, value=0)],
        [view(4, 3, 24, 24), 255 * view(4, 3, 24, 24)],
        [view(4, 3, 24, 24), view(4, 3, 24, 24) * torch.nan],
    ):
        with pytest.raises(RuntimeError, match="a batch must be"):
            check(wrong, work, 2)


class Once:
    """A connection that asks for one probe and then ends."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def recv(self) -> tuple[int, None]:
        if self.told:
            raise EOFError
        return 0, None

    def send(self, told: object) -> None:
        self.told.append(told)


def test_what_a_process_answers_for_those_who_cannot_run(bench, work, monkeypatch):
    import _data_process
    from _data_contenders import Absent, Contender

    def absent(work, seed):
        raise Absent("no colour jitter")
        yield ()

    def missing(work, seed):
        raise ImportError("no module")
        yield ()

    def broken(work, seed):
        yield ()

    def crashed(work, seed):
        raise OSError("cannot open /some/folder/file.jpg")
        yield ()

    every = tuple(Contender(start.__name__, start) for start in (absent, missing, broken, crashed))
    monkeypatch.setattr(_data_process, "EVERY", every)
    expected = {
        "absent": "cannot run here: no colour jitter",
        "missing": "not installed (no module)",
        "broken": "failed: RuntimeError: a batch must be 2 views, float32 (4, 3, 24, 24) on cpu, got []",
        "crashed": "failed: OSError: cannot open file.jpg",
    }
    for name, answer in expected.items():
        once = Once()
        _data_process.serve(once, name, work)
        assert once.told == [answer]


def test_one_that_stops_is_said_and_not_measured(bench):
    class Stopped:
        asked = 0

        def take(self, seed, window):
            self.asked += 1
            return "failed: the process ended"

    statuses, stopped = {"it": "ok"}, Stopped()
    lap = bench.lap(stopped, bench.Window(1, 0), "it", statuses)
    assert np.isnan([lap(), lap()]).all()
    assert (statuses, stopped.asked) == ({"it": "failed: the process ended"}, 1)


def test_one_that_does_not_answer_is_ended(bench, work, monkeypatch):
    monkeypatch.setattr("_data_process.LIMIT_S", 0.1)
    server = bench.Server("simclr_fast torchvision", work)  # whose process takes longer to start
    try:
        assert server.take(0, None).startswith("failed: no answer within")
        assert not server._process.is_alive()
        assert server.take(1, None) == "failed: the process ended"
    finally:
        server.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_time_and_memory_of_processes(bench):
    from _data_process import cpu_seconds, family, resident_mib

    me = os.getpid()
    assert family()[0] == me
    before, end = cpu_seconds([me]), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert 0.2 < cpu_seconds([me]) - before < 1
    # Not from malloc, which may have that much left of what was freed before.
    memory, block = resident_mib([me]), np.frombuffer(mmap.mmap(-1, 2**25), np.uint8)
    block[:] = 1
    assert 25 < resident_mib([me]) - memory < 60
    del block


def test_sweeps_are_of_ours_alone(bench, work):
    args = bench.argparse.Namespace(only=["v2, PIL"], workers=[1, 2], hardware=[0.5, 0.9])
    labels = [job.label for job in bench.jobs(work, args)]
    assert labels[:2] == ["simclr_fast dali", "torchvision v2, PIL"]
    assert labels[2:] == [f"simclr_fast dali, {w} workers, {h} on decoders" for w in (1, 2) for h in (0.5, 0.9)]
    settings = {(job.work.workers, job.work.hardware) for job in bench.jobs(work, args)[2:]}
    assert settings == {(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["a", "b", "--size", "32"], "DATA must be one"),
        (["--size", "0"], "must be at least 1"),
        (["--device", "cpu", "--hardware", "0.5"], "--hardware is for --device cuda"),
    ],
)
def test_flags_that_are_refused(bench, capsys, flags, told):
    with pytest.raises(SystemExit):
        bench.parsed(flags)
    assert told in capsys.readouterr().err


def test_workers_are_taken_once(bench):
    assert bench.parsed(["--device", "cpu", "--workers", "1", "1"]).workers == [1]


def test_of_a_large_set_some_images_evenly_spaced(bench, work):
    few = bench.thinned(work.split, 5)
    assert list(few.names) == [work.split.names[k] for k in (0, 2, 4, 7, 9)]
    assert [few.read(k).tobytes() for k in range(5)] == [work.split.read(k).tobytes() for k in (0, 2, 4, 7, 9)]
    assert few.labels.tolist() == work.split.labels[[0, 2, 4, 7, 9]].tolist()
    assert bench.thinned(work.split, 12) is work.split
    pixels = bench.replace(work.split, pixels=np.arange(12)[:, None], labels=None, stamps=None)
    assert bench.thinned(pixels, 2).pixels.tolist() == [[0], [6]]
    assert bench.thinned(pixels, 2).labels is None


def test_data_of_each_size(bench, tmp_path, monkeypatch):
    assert bench.data_for(224, tmp_path).endswith("photos-256.tar")
    monkeypatch.setattr(bench, "CIFAR", tmp_path / "absent")
    assert bench.data_for(32, tmp_path) == "shapes"


def test_picture(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    line = {"device": "cpu", "torch": "2.15", "size": 32, "workers": 2, "contender": "simclr_fast dali"}
    lines = [line | {"images_per_s": {"p50": 100.0}, "views_per_s": views} for views in (200.0, None)]
    bench.picture([*lines, line | {"status": "not installed"}], tmp_path / "data.svg")
    assert (tmp_path / "data.svg").read_text().count("<svg") == 1

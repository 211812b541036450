"""The check of every image: what it refuses, processes that die or hang, what is remembered."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simclr_fast.data.sources import check as checker
from simclr_fast.data.sources import scan as scanner
from simclr_fast.data.sources.check import Verdict, check
from simclr_fast.data.sources.samples import Sample
from simclr_fast.data.sources.scan import scan, verdicts
from tests.images_common import encoded, fill


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch):
    """Check in processes, however few the images are, three at a time."""
    monkeypatch.setattr(scanner, "PROCESSES_FROM", 1)
    monkeypatch.setattr(scanner, "PER_PROCESS", 1)
    monkeypatch.setattr(scanner, "CHUNK", 3)


def samples(root: Path) -> list[Sample]:
    found = []
    for path in sorted(root.iterdir()):
        stat = path.stat()
        found.append(Sample(path.name, str(path), 0, stat.st_size, stat.st_mtime_ns))
    return found


def jobs(root: Path) -> list[tuple[str, int, int]]:
    return [(s.path, s.offset, s.length) for s in samples(root)]


def checker_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put lines before the decoding in the processes; `path` is the file's."""
    source = Path(checker.__file__).read_text()
    start = "    if length > MAX_BYTES:\n"
    assert start in source
    script = tmp_path / "checker.py"
    script.write_text(source.replace(start, f"    path = os.fsdecode(path)\n    {body}\n{start}"))
    monkeypatch.setattr(checker, "__file__", str(script))


def test_processes_and_threads_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", *(f"{k:03d}.jpg" for k in range(200)))
    fill(root, "007.jpg", "100.jpg", content=b"no image")
    (root / os.fsdecode(b"\xff.jpg")).write_bytes(encoded())
    monkeypatch.setattr(scanner, "PROCESSES_FROM", 1000)
    found = list(verdicts(jobs(root), 201, 2))
    assert sum(bool(each.fault) for each in found) == 2
    monkeypatch.setattr(scanner, "PROCESSES_FROM", 1)
    assert list(verdicts(jobs(root), 201, 2)) == found


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(1)"])
def test_an_image_that_ends_its_process_is_at_fault_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
):
    root = fill(tmp_path / "set", *(f"{k}.jpg" for k in range(9)))
    checker_that(tmp_path, monkeypatch, f"if path.endswith('4.jpg'): {end}")
    found = list(verdicts(jobs(root), 9, 2))
    assert [k for k, each in enumerate(found) if each.fault] == [4]
    assert found[4].fault.startswith("decoding it ends the process")
    assert not found[4].lasting


@pytest.mark.usefixtures("processes")
def test_a_process_that_is_killed_once_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, mark = fill(tmp_path / "set", *(f"{k}.jpg" for k in range(9))), tmp_path / "mark"
    once = f"if path.endswith('4.jpg') and not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w'); os._exit(9)"
    checker_that(tmp_path, monkeypatch, once)
    assert not any(each.fault for each in verdicts(jobs(root), 9, 2))
    assert mark.exists()


@pytest.mark.usefixtures("processes")
def test_an_image_that_takes_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", *(f"{k}.jpg" for k in range(4)))
    monkeypatch.setattr(scanner, "LIMIT_S", 0.5)
    checker_that(tmp_path, monkeypatch, "import time; time.sleep(600 * path.endswith('2.jpg'))")
    assert [each.fault for each in verdicts(jobs(root), 4, 2)] == ["", "", "decoding it takes over 0.5 s", ""]


@pytest.mark.usefixtures("processes")
def test_where_no_process_can_be_had_it_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", "1.jpg", "2.jpg")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert list(verdicts(jobs(root), 2, 1)) == [Verdict(12, 9)] * 2


def test_processes_import_neither_torch_nor_numpy():
    listed = "print('torch' in sys.modules, 'numpy' in sys.modules)"
    code = f"import sys, runpy; runpy.run_path({checker.__file__!r}); {listed}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def children() -> set[str]:
    """The process ids of what this process has started, whatever the thread."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_an_interrupt_ends_the_processes_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", *(f"{k:02d}.jpg" for k in range(40)))
    monkeypatch.setattr(scanner, "CACHED_FROM", 1)
    checker_that(tmp_path, monkeypatch, "import time; time.sleep(600 * path.endswith('39.jpg'))")
    real, before = scanner._Cache.note, children()

    def interrupted(self, row, found):
        real(self, row, found)
        if row == 30:
            assert children() - before
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(scanner._Cache, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scan(samples(root), str(root), 2)
    assert not children() - before
    assert 31 <= 40 - len(scanner._Cache(next((tmp_path / "cache").rglob("*.npz")), samples(root)).unknown) < 40


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_processes_end_with_the_one_that_started_them(tmp_path: Path):
    code = (
        "import os, signal\nfrom simclr_fast.data.sources import scan\n"
        "worker = scan._Worker()\nprint(worker._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        pytest.fail("it goes on")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded, once all sets are cached."""
    seen: list[str] = []
    monkeypatch.setattr(scanner, "CACHED_FROM", 1)

    def checked(path, offset, length):
        seen.append(Path(path).name)
        return check(path, offset, length)

    monkeypatch.setattr(checker, "check", checked)
    return seen


def test_only_what_has_changed_is_decoded_again(tmp_path: Path, counted: list[str]):
    root = fill(fill(tmp_path / "set", "a.jpg", "b.jpg", "c.jpg"), "d.jpg", content=b"no")
    first = scan(samples(root), str(root))
    assert sorted(counted) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    counted.clear()
    again = scan(samples(root), str(root))
    assert not counted
    np.testing.assert_array_equal(again.sizes, first.sizes)
    assert again.faults == first.faults == {3: "it is not an image"}
    fill(root, "b.jpg", "d.jpg", content=encoded((5, 6)))
    fill(root, "0.jpg")
    changed = scan(samples(root), str(root))
    assert sorted(counted) == ["0.jpg", "b.jpg", "d.jpg"]
    assert changed.sizes.tolist() == [[12, 9], [12, 9], [5, 6], [12, 9], [5, 6]]
    assert not changed.faults
    counted.clear()
    (root / "a.jpg").unlink()
    scan(samples(root), str(root))
    assert not counted
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"PK\x03\x04" + bytes(100)])
def test_garbage_in_the_cache_is_as_none(tmp_path: Path, counted: list[str], garbage: bytes):
    root = fill(tmp_path / "set", "a.jpg")
    scan(samples(root), str(root))
    next((tmp_path / "cache").rglob("*.npz")).write_bytes(garbage)
    counted.clear()
    assert scan(samples(root), str(root)).sizes.tolist() == [[12, 9]]
    assert counted == ["a.jpg"]


def test_a_fault_that_may_pass_is_not_remembered(tmp_path: Path, counted: list[str]):
    found = [*samples(fill(tmp_path / "set", "a.jpg")), Sample("b.jpg", str(tmp_path / "set" / "b.jpg"), 0, 9, 9)]
    assert list(scan(found, "x").faults) == [1]
    counted.clear()
    scan(found, "x")
    assert counted == ["b.jpg"]


def test_a_sample_that_has_a_fault_keeps_it(tmp_path: Path, counted: list[str]):
    assert scan([Sample("x", "x", fault="lost")], "x").faults == {0: "lost"}
    assert not counted


@pytest.mark.parametrize("faults", [{"x": "no number"}, {str(2**70): "too large"}, {"-1": "negative"}])
def test_faults_in_the_cache_that_make_no_sense_are_as_none(tmp_path: Path, counted: list[str], faults: dict[str, str]):
    root = fill(tmp_path / "set", "a.jpg")
    scan(samples(root), str(root))
    cache = next((tmp_path / "cache").rglob("*.npz"))
    with np.load(cache) as file:
        kept = {"keys": file["keys"], "sizes": file["sizes"] + 1}
    np.savez(cache, **kept, faults=np.frombuffer(json.dumps(faults).encode(), np.uint8))
    counted.clear()
    assert scan(samples(root), str(root)).sizes.tolist() == [[12, 9]]
    assert counted == ["a.jpg"]


def test_another_pillow_checks_again(tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", "a.jpg")
    scan(samples(root), str(root))
    monkeypatch.setattr("PIL.__version__", "0.0")
    scan(samples(root), str(root))
    monkeypatch.setattr("PIL.features.check", lambda name: None)
    scan(samples(root), str(root))
    assert counted == ["a.jpg"] * 3


def test_of_two_processes_at_once_one_decodes_and_the_other_waits(tmp_path: Path, counted: list[str]):
    root = fill(tmp_path / "set", *(f"{k}.jpg" for k in range(5)))
    code = (
        "import sys, time\nfrom simclr_fast.data.sources import check, scan\n"
        "from simclr_fast.data.sources.samples import Sample\n"
        "scan.CACHED_FROM, real, seen = 1, check.check, []\n"
        "def slow(*job):\n    time.sleep(0.2)\n    seen.append(job)\n    return real(*job)\n"
        "check.check = slow\nprint('ready', flush=True)\n"
        "scan.scan([Sample(*row) for row in eval(sys.stdin.readline())], 'set', 1)\nprint(len(seen))\n"
    )
    rows = [tuple(sample) for sample in samples(root)]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        other.stdin.write(f"{rows}\n")
        other.stdin.flush()
        found = scan(samples(root), "set", 1)
        assert sorted([int(other.stdout.readline()), len(counted)]) == [0, 5]
    assert found.sizes.tolist() == [[12, 9]] * 5

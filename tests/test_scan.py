"""The check of every image: what it refuses, processes that die or hang, what is remembered."""

import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def verdict(content: bytes, tmp_path: Path) -> Verdict:
    path = tmp_path / "image"
    path.write_bytes(content)
    return check(str(path), 0, len(content))


def checker_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put lines before the decoding in the processes; `path` is the file's."""
    source = Path(checker.__file__).read_text()
    start = "    if length > MAX_BYTES:\n"
    assert start in source
    script = tmp_path / "checker.py"
    script.write_text(source.replace(start, f"    path = os.fsdecode(path)\n    {body}\n{start}"))
    monkeypatch.setattr(checker, "__file__", str(script))


@pytest.mark.parametrize(
    ("size", "mode", "kind"),
    [
        ((1, 1), "RGB", "JPEG"),
        ((3, 2000), "RGB", "JPEG"),
        ((20000, 100), "RGB", "JPEG"),
        ((12, 9), "CMYK", "JPEG"),
        ((12, 9), "L", "JPEG"),
        ((12, 9), "1", "PNG"),
        ((12, 9), "P", "PNG"),
        ((12, 9), "RGBA", "PNG"),
        ((12, 9), "I;16", "PNG"),
        ((12, 9), "RGB", "WEBP"),
    ],
)
def test_sound_images_have_their_size(tmp_path: Path, size: tuple[int, int], mode: str, kind: str):
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full(size, 40000, np.uint16)).save(buffer, kind)
        content = buffer.getvalue()
    else:
        content = encoded(size, mode, kind)
    assert verdict(content, tmp_path) == Verdict(*size)


def test_a_turned_image_has_the_size_that_it_is_stored_in(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert verdict(encoded((10, 20), exif=exif), tmp_path) == Verdict(10, 20)


@pytest.mark.parametrize("side", [(10_001, 10_000), (20_000, 20_000)])
def test_too_many_pixels_are_a_fault_in_plain_words(tmp_path: Path, side: tuple[int, int]):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", side).save(buffer, "PNG")
        found = verdict(buffer.getvalue(), tmp_path)
    assert found.fault == "it has over 100 megapixels"


def test_a_float_or_unended_text_pixmap_is_refused_as_dali_does(tmp_path: Path):
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "PPM")
    assert "not supported" in verdict(buffer.getvalue(), tmp_path).fault
    assert verdict(b"P2\n2 2\n255\n1 2 3 4\n", tmp_path) == Verdict(2, 2)
    assert "cut short" in verdict(b"P2\n2 2\n255\n1 2 3 4", tmp_path).fault


@pytest.mark.parametrize("damage", ["no end", "checksum", "last chunk"])
def test_a_png_must_have_its_chunks_to_the_end(tmp_path: Path, damage: str):
    content = bytearray(encoded(kind="PNG"))
    if damage == "no end":
        del content[-12:]
    elif damage == "checksum":
        content[-14] ^= 1  # of the last data chunk
    else:
        content[-8] ^= 1
    assert verdict(bytes(content), tmp_path).fault


def test_a_bmp_must_have_its_last_padding_and_a_palette_that_fits(tmp_path: Path):
    content = bytearray(encoded((5, 7), "L", "BMP"))
    assert verdict(content, tmp_path) == Verdict(5, 7)
    assert "cut short" in verdict(content[:-1], tmp_path).fault
    content = bytearray(encoded((5, 7), "1", "BMP"))
    assert verdict(content, tmp_path) == Verdict(5, 7)
    content[46:50] = (40_000).to_bytes(4, "little")
    assert "damaged" in verdict(content, tmp_path).fault


def test_what_is_no_file_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert check(str(tmp_path / "pipe.jpg"), 0, 10).fault == "it is not a regular file"
    assert check(str(tmp_path), 0, 10).fault == "it is not a regular file"


def test_a_file_without_permission_is_a_fault_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # not by its mode, which does not bind root
    found = check("a.jpg", 0, 10)
    assert (found.fault, found.lasting) == ("OSError: [Errno 13] Permission denied", False)


def test_a_file_that_shrinks_or_goes_is_a_fault_for_now(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encoded())
    assert check(str(tmp_path / "a.jpg"), 0, 10**6) == Verdict(0, 0, "its file is cut short", False)
    gone = check(str(tmp_path / "gone.jpg"), 0, 10)
    assert (gone.fault, gone.lasting) == ("OSError: [Errno 2] No such file or directory", False)


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
    real = scanner._Cache.note

    def interrupted(self, row, found):
        real(self, row, found)
        if row == 30:
            assert children()
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(scanner._Cache, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scan(samples(root), str(root), 2)
    assert not children()
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

"""`python -m simclr_fast.data`: what each command prints, writes and returns."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data.__main__ import COMMANDS, main


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for k in range(6):
        path = tmp_path / "set" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    return tmp_path / "set"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_packing_then_checking_then_damage(source: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "pack", "set", "packed", "--per-shard", "4", "--short-side", "16", "--seed", "5")
    assert (status, out) == (0, "packed 6 images into 2 shards in packed, 0.0 MB\n")
    status, out, _ = run(capsys, "check", "packed", "--json", "report.json", "--image-size", "17")
    assert status == 0
    assert "6 images with a side below 17 pixels" in out
    assert out.endswith("clean\n")
    assert json.loads(Path("report.json").read_text())["parts"]["train"]["short_side"]["median"] == 16
    Path("packed/train-000000.idx").write_text("v1.2 0\n")
    status, out, _ = run(capsys, "check", "packed")
    assert status == 1
    assert "train-000000.tar: its index does not match" in out
    assert run(capsys, "pack", "set", "packed", "--per-shard", "4", "--short-side", "16", "--seed", "5")[0] == 0
    assert run(capsys, "check", "packed")[0] == 0


def test_what_cannot_be_read_is_told_by_pack_and_check(source: Path, capsys: pytest.CaptureFixture[str]):
    (source / "a" / "7.jpg").write_bytes(b"")
    status, out, _ = run(capsys, "check", "set")
    assert status == 1
    assert "a/7.jpg: it has zero bytes" in out
    status, out, _ = run(capsys, "pack", "set", "packed")
    assert status == 0
    assert "left out 1 that cannot be read, the first a/7.jpg: it has zero bytes" in out
    status, _, err = run(capsys, "pack", "set", "strict", "--tolerate-unreadable", "0")
    assert status == 2
    assert err.startswith("error: data must hold at most 0 % images that cannot be read")


def test_pack_tells_images_left_out_from_those_that_cannot_be_read(source: Path, capsys: pytest.CaptureFixture[str]):
    for part, label, number in (("train", "a", 0), ("train", "b", 1), ("test", "a", 2), ("test", "c", 4)):
        path = source / part / label / "9.jpg"
        path.parent.mkdir(parents=True)
        (source / "ab"[number % 2] / f"{number}.jpg").rename(path)
    status, out, _ = run(capsys, "pack", "set", "packed")
    assert status == 0
    assert "\nleft out 3 that are not of the set, the first " in out
    assert "cannot be read" not in out
    status, out, _ = run(capsys, "check", "set")
    assert status == 0
    assert "left out    3 images" in out
    assert "class 'c' is not in train" in out


def test_a_closed_output_takes_one_line(source: Path):
    command = [sys.executable, "-m", "simclr_fast.data", "check", str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (2, "error: the output was closed before all was written\n")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "x"), RuntimeError("no\nhome")])
def test_errors_of_the_system_take_one_line(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("simclr_fast.data.__main__.open_dataset", failing)
    status, _, err = run(capsys, "check", "set")
    assert (status, err) == (2, f"error: {' '.join(str(error).split())}\n")


def test_a_preview(source: Path, capsys: pytest.CaptureFixture[str]):
    flags = "--count 1 --image-size 16 --dialect tf --seed 2 --epoch 3 --jitter 0.5 --blur 0 --min-area 0.5".split()
    status, out, _ = run(capsys, "preview", "set", "page.html", *flags)
    assert status == 0
    assert out.startswith("wrote page.html, ")
    page = Path("page.html").read_text(encoding="utf-8")
    for text in ("tf", "strength 0.5", "16 × 16 px", "0.5 of the area", "in epoch 3 of a run with seed 2"):
        assert text in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pak set packed", "command must be one of preview, pack, check, got 'pak'; did you mean 'pack'?"),
        ("pack set", "the following arguments are required: DST"),
        ("pack set packed more", "pack takes no further argument, got 'more'"),
        ("pack set packed --short-sid 3", "'--short-sid'; did you mean '--short-side'?"),
        ("pack set packed --quality 0", "argument --quality: must be an integer in [1, 100], got '0'"),
        ("pack set packed --shard-mib nan", "argument --shard-mib: must be a number at least 0.001, got 'nan'"),
        ("pack set set/packed", "must lie outside what is packed"),
        ("pack nowhere packed", "data must be an existing path"),
        ("preview shaeps page.html", "did you mean 'shapes'?"),
        ("preview set page.html --dialect tv", "dialect must be one of torchvision, tf, got 'tv'"),
        ("preview set page.html --dialect torchvison", "did you mean 'torchvision'?"),
        ("preview set page.html --jitter 2", "argument --jitter: must be a number in [0, 1.25], got '2'"),
        ("preview set set --count 1", "the page 'set' cannot be written"),
        ("check ~nobody-of-that-name/x", ""),
        ("check set --json nowhere/report.json", "json must be a file that can be written"),
    ],
)
def test_mistakes_take_one_line_and_status_2(source: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str):
    status, _, err = run(capsys, *argv.split())
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("packed").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"simclr_fast.data {command}" in capsys.readouterr().out
    assert all(action.help for action in COMMANDS[command]()._actions)


def test_without_a_command_it_lists_them():
    done = subprocess.run([sys.executable, "-m", "simclr_fast.data"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(f"\n  {command} " in done.stderr for command in COMMANDS)


def test_an_interrupt_is_no_traceback(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("simclr_fast.data.__main__.pack", interrupted)
    assert run(capsys, "pack", "set", "packed") == (130, "", "stopped\n")

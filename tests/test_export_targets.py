"""Where exports are written: whole or not at all, over nothing that is wanted, and said before the work if not."""

import resource
import signal
from pathlib import Path

import pytest

from simclr_fast import export, load
from tests.export_common import command, run, trained

__all__ = ["run"]  # a fixture is used by its name


def test_what_is_there_is_kept(tmp_path, run, capsys):
    file, folder, other = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "home"
    file.write_text("mine")
    assert command(run, "safetensors", file) == 2
    assert f"error: out must not exist yet, got out={file}; --overwrite replaces it" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert command(run, "safetensors", file, "--overwrite") == 0
    assert load(file).step == 3

    assert command(run, "huggingface", folder) == 0
    (folder / "README.md").write_text("mine")
    assert command(run, "huggingface", folder) == 2
    assert (folder / "README.md").read_text() == "mine"
    assert command(run, "huggingface", folder, "--overwrite") == 0
    assert "SimCLR" in (folder / "README.md").read_text()

    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert command(run, "huggingface", other, "--overwrite") == 2
    assert f"{other} has thesis.tex" in capsys.readouterr().err
    assert command(run, "huggingface", file, "--overwrite") == 2
    assert f"out must be a folder, and {file} is a file" in capsys.readouterr().err
    folder.rename(folder.with_suffix(".safetensors"))
    assert command(run, "safetensors", folder.with_suffix(".safetensors"), "--overwrite") == 2
    assert "folder.safetensors is a folder" in capsys.readouterr().err
    assert (other / "thesis.tex").read_text() == "mine"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.safetensors", "folder.safetensors", "home"]


def test_the_folder_that_a_link_leads_to_is_written(tmp_path, run):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert command(run, "huggingface", tmp_path / "link") == 0
    assert (tmp_path / "link").readlink() == Path("folder")
    assert (tmp_path / "folder" / "README.md").is_file()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["folder", "link"]


@pytest.mark.parametrize("form", ["huggingface", "safetensors"])
def test_links_that_lead_nowhere_are_said_before_the_work(tmp_path, run, monkeypatch, capsys, form):
    monkeypatch.setattr(export.Settings, "encoder", None)
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "absent.safetensors").symlink_to("/proc/absent/a.safetensors")
    for name in ("loop", "absent"):
        assert command(run, form, tmp_path / f"{name}.safetensors") == 2
        assert "that can be written, got out=" in capsys.readouterr().err


def test_the_current_folder_is_not_replaced(tmp_path, run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(run, "huggingface", ".") == 2
    assert "out must be another folder than the current one, got out=." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(tmp_path, run, monkeypatch, capsys, error):
    out = tmp_path / "folder"
    assert command(run, "huggingface", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(weights, metadata):
        raise error

    monkeypatch.setattr("safetensors.torch.save", fails)
    assert command(run, "huggingface", out, "--overwrite") == (1 if isinstance(error, OSError) else 130)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [child.name for child in tmp_path.iterdir()] == ["folder"]


def test_a_target_that_cannot_be_written_is_said_before_the_work(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(export.Settings, "encoder", None)
    (tmp_path / "file").write_text("mine")
    for form, kind, name in (("safetensors", "file", "a.safetensors"), ("huggingface", "folder", "a")):
        for out in (tmp_path / "file" / name, Path("/proc/absent") / name, tmp_path / ("a" * 300 + name)):
            assert command(run, form, out) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: out must be a {kind} that can be written, got out={out}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("form", "out"), [
    ("torchvision", "a.pth"), ("safetensors", "a.safetensors"), ("onnx", "a.onnx"), ("huggingface", "a")])  # fmt: skip
def test_a_full_disk_is_said(tmp_path, form, out):
    """All of what the packages that write have to say of one."""
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra export")
    encoder = trained(arch="resnet18", image_size=32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        with pytest.raises(OSError, match=f"^out must be a path that can be written, got out={tmp_path / out}: File t"):
            export.export(encoder, export.FORMATS[form](), tmp_path / out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("form", "out", "message"), [
    ("onnx", "a.pth", r"out must end with .onnx, got out="), ("timm", "a.onnx", "out must end with .pth or .pt, got"),
    ("safetensors", "a", "out must end with .safetensors, got out=")])  # fmt: skip
def test_other_endings_are_refused(tmp_path, run, capsys, form, out, message):
    assert command(run, form, tmp_path / out) == 2
    assert message in capsys.readouterr().err

"""`embed`: features of folders with and without labels, of one or several ranks; what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_fast import embed, load
from simclr_fast.evaluation.job import Job
from tests.encoder_common import saved
from tests.train_common import images, jpeg  # noqa: F401

FLAGS = ("--gpus", "0", "--no-cache", "--precision", "fp32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saved(folder)
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """Images without labels."""
    folder = tmp_path_factory.mktemp("flat")
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, 20 + number, "L" if number == 3 else "RGB"))
    return folder


def command(checkpoint: Path, data: Path, out: Path, *flags: str) -> int:
    return embed.main(["--checkpoint", str(checkpoint), "--data", str(data), str(out), *FLAGS, *flags])


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def near(ours: np.ndarray, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4)


def test_images_without_labels(checkpoint, flat, tmp_path, capsys):
    assert command(checkpoint, flat, tmp_path / "deep" / "a.npz") == 0
    out, encoder = read(tmp_path / "deep" / "a.npz"), load(checkpoint)
    assert out["features"].dtype == np.float32
    assert out["names"].tolist() == [f"{number}.jpg" for number in range(7)]
    assert out["labels"].tolist() == [-1] * 7
    assert out["classes"].tolist() == []
    assert set(out["parts"]) == {"train"}
    near(out["features"], encoder(torch.stack([encoder.preprocess(flat / name) for name in out["names"]])))
    about = json.loads(str(out["about"]))
    assert (about["weights"], about["step"], about["layer"]) == (encoder.digest(), 3, "h")
    assert f"7 features of {encoder.num_features} numbers: {tmp_path}/deep/a.npz" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_images_with_labels_and_parts(checkpoint, images, tmp_path):  # noqa: F811
    for part in ("all", "train", "test"):
        assert command(checkpoint, images, tmp_path / f"{part}.npz", "--part", part) == 0
    every, train, test = (read(tmp_path / f"{part}.npz") for part in ("all", "train", "test"))
    assert every["classes"].tolist() == ["ant", "bee"]
    assert (len(train["names"]), len(test["names"])) == (40, 10)
    for name in ("features", "names", "labels", "parts"):
        assert np.array_equal(every[name], np.concatenate([train[name], test[name]]))
    assert set(zip(every["parts"].tolist(), every["names"].tolist(), strict=True)) == {
        (path.parts[-3], "/".join(path.parts[-2:])) for path in images.rglob("*.jpg")
    }
    assert [every["classes"][label] for label in every["labels"]] == [name.split("/")[0] for name in every["names"]]


def test_embeddings(checkpoint, flat, tmp_path):
    assert command(checkpoint, flat, tmp_path / "h.npz") == 0
    assert command(checkpoint, flat, tmp_path / "z.npz", "--layer", "z") == 0
    h, z = (read(tmp_path / f"{layer}.npz")["features"] for layer in "hz")
    near(z, load(checkpoint).head(torch.from_numpy(h)))
    assert z.shape == (7, 8)


@pytest.mark.slow
def test_several_ranks_give_the_same(checkpoint, flat, tmp_path, capfd):
    assert command(checkpoint, flat, tmp_path / "one.npz") == 0
    assert command(checkpoint, flat, tmp_path / "two.npz", "--ranks", "2") == 0
    one, two = read(tmp_path / "one.npz"), read(tmp_path / "two.npz")
    near(one["features"], torch.from_numpy(two["features"]))
    assert np.array_equal(one["names"], two["names"])
    assert capfd.readouterr().out.count("7 features of") == 2


def test_what_is_there_is_kept(checkpoint, flat, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.npz"
    out.write_text("mine")
    assert command(checkpoint, flat, out) == 2
    assert out.read_text() == "mine"
    assert f"error: out must not exist yet, got out={out}; --overwrite replaces it" in capsys.readouterr().err

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed.np, "savez", full)
    assert command(checkpoint, flat, out, "--overwrite") == 1
    said = capsys.readouterr().err
    assert f"error: out must be a path that can be written, got out={out}: No space left on device\n" in said
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.npz", "mine")]
    monkeypatch.undo()
    assert command(checkpoint, flat, out, "--overwrite") == 0
    assert len(read(out)["features"]) == 7


def test_nothing_is_computed_for_a_target_that_cannot_be(checkpoint, flat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Job, "__init__", None)
    assert command(checkpoint, flat, tmp_path / "a.npy") == 2
    assert "out must end with .npz, got out=" in capsys.readouterr().err
    assert command(checkpoint, flat, tmp_path) == 2
    capsys.readouterr()
    assert command(tmp_path / "absent", flat, tmp_path / "a.npz") == 2
    assert "checkpoint must be a run's folder or a checkpoint file that exists" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "a.npz", Path("/proc/absent/a.npz")):
        assert command(checkpoint, flat, out) == 2
        assert f"error: out must be a file that can be written, got out={out}: " in capsys.readouterr().err


def test_other_bad_input(checkpoint, flat, tmp_path, capsys):
    out = tmp_path / "a.npz"

    def error(*arguments, **options) -> str:
        assert command(*arguments, *options.get("flags", ())) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "part must be one that the data set has, got part=test, and flat" in error(
        checkpoint, flat, out, flags=("--part", "test")
    )
    assert "got 'nowhere'" in error(checkpoint, "nowhere", out)
    (tmp_path / "none").mkdir()
    assert error(checkpoint, tmp_path / "none", out).startswith("error: data must")
    saved(tmp_path / "bare", head="none")
    assert "layer must be h for an encoder without a projection head, got layer=z" in error(
        tmp_path / "bare", flat, out, flags=("--layer", "z")
    )
    with pytest.raises(SystemExit):  # a flag that cannot be parsed, said by tyro
        command(checkpoint, flat, out, "--ranks", "0")
    assert "ranks must be at least 1, got ranks=0" in capsys.readouterr().err

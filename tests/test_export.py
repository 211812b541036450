"""Exports: equal features in the programs they are for, what `load` reads back, what is written and what is refused."""

import builtins
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from simclr_fast import export, load
from simclr_fast.checkpoint import CheckpointError
from simclr_fast.config import ConfigError
from simclr_fast.exporting import format as forms
from simclr_fast.exporting import onnx_file
from simclr_fast.models import encoder as new_encoder
from simclr_fast.models.weights import load_weights
from simclr_fast.pretrained import Encoder, Recipe
from tests.export_common import OFFICIAL, TINY, close, command, images, run, trained

__all__ = ["run"]  # a fixture is used by its name

SLOW = pytest.mark.slow
STATE_DICTS = [
    ("torchvision", dict(arch="resnet18", image_size=64)),
    ("torchvision", dict(arch="resnet18", image_size=32)),
    ("torchvision", dict(image_size=56, **OFFICIAL)),
    ("timm", dict(arch="resnet18", image_size=64)),
    ("timm", dict(arch="timm:test_vit", image_size=96)),
    ("timm", dict(arch="timm:test_resnet.r160_in1k", image_size=64)),
    pytest.param("torchvision", dict(arch="resnet34", image_size=64), marks=SLOW),
    pytest.param("torchvision", dict(image_size=66, **OFFICIAL), marks=SLOW),
    pytest.param("torchvision", dict(image_size=32, **OFFICIAL), marks=SLOW),
    pytest.param("timm", dict(arch="resnet50", image_size=64), marks=SLOW),
    pytest.param("timm", dict(arch="resnet18", image_size=32), marks=SLOW),
    pytest.param("timm", dict(image_size=56, **OFFICIAL), marks=SLOW),
]


def by_usage(form, encoder: Encoder, path: Path):
    """What the lines that are shown to the user make."""
    scope: dict = {}
    exec("\n".join(form.usage(encoder, path)), scope)
    return scope["model"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    STATE_DICTS,
    ids=lambda value: value if isinstance(value, str) else "-".join(str(one) for one in value.values()),
)
def test_state_dicts_load_strictly_and_give_equal_features(tmp_path, name, recipe):
    encoder, path, form = trained(**recipe), tmp_path / "a.pth", export.FORMATS[name]()
    assert "takes all of it" in export.export(encoder, form, path)
    model = by_usage(form, encoder, path)
    assert type(model).__module__.startswith(name)
    x = images(encoder)
    with torch.no_grad():
        close(encoder(x), model(x))

    if recipe.get("variant") == "official" and recipe["image_size"] == 56:
        model.maxpool = nn.MaxPool2d(3, 2, padding=1)
        with torch.no_grad(), pytest.raises(AssertionError):
            close(encoder(x), model(x))


@pytest.mark.parametrize(
    ("form", "recipe", "message"),
    [
        ("torchvision", TINY, "format=torchvision cannot express arch=resnet8, which only this project has; it takes"),
        ("timm", TINY, "format=timm cannot express arch=resnet8.*safetensors, onnx and huggingface take any encoder"),
        ("timm", dict(arch="resnet18", width=0.5), "timm cannot express width=0.5, for theirs have width 1"),
        ("torchvision", dict(arch="timm:test_vit", image_size=96), "cannot express arch=timm:test_vit; timm, safetens"),
        ("torchvision", dict(arch="resnet18", variant="official"), "variant=official of resnet18, for its first group"),
        ("timm", dict(arch="resnet50", variant="official", sk_ratio=0.0625), "selective kernels, sk_ratio=0.0625"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, form, recipe, message):
    with torch.device("meta"):
        encoder = Encoder(Recipe(**recipe), "somewhere")
    with pytest.raises(ConfigError, match=message):
        export.export(encoder, export.FORMATS[form](), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [TINY, dict(arch="timm:test_vit", image_size=96)], ids=["resnet8", "vit"])
def test_safetensors(tmp_path, recipe):
    from safetensors import safe_open

    encoder, path = trained(**recipe), tmp_path / "a.safetensors"
    export.export(encoder, export.Safetensors(), path)
    again = by_usage(export.Safetensors(), encoder, path)
    assert torch.equal(again(images(encoder)), encoder(images(encoder)))
    assert (again.recipe, again.step, again.data) == (encoder.recipe, 7, "birds")
    assert not again.training

    with safe_open(path, "pt") as file:
        card = file.metadata()
        assert set(file.keys()) == set(encoder.network.state_dict())
    assert card["weights"] == encoder.digest()
    assert (card["arch"], card["image_size"], card["step"], card["data"]) == (
        recipe["arch"], str(recipe["image_size"]), "7", "birds")  # fmt: skip
    assert "bicubic" in card["preprocessing"]
    assert json.loads(card["mean"]) == [0.485, 0.456, 0.406]

    target = new_encoder(recipe["arch"], width=recipe.get("width", 1.0), image_size=recipe["image_size"])
    load_weights(target, str(path), recipe["arch"])
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in encoder.network.state_dict().items())


def test_a_file_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    export.export(trained(**TINY), export.Safetensors(), path)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.safetensors: its weights do not match their checksum"):
        load(path)
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="cannot read .*a.safetensors: "):
        load(path)


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    encoder, path = trained(**TINY), tmp_path / "a.onnx"
    assert "onnxruntime gives the encoder's features" in export.export(encoder, export.Onnx(), path)
    assert [child.name for child in tmp_path.iterdir()] == ["a.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [one.version for one in model.opset_import if one.domain == ""] == [18]
    assert {one.key: one.value for one in model.metadata_props}.items() >= forms.card(encoder).items()
    session = runtime.InferenceSession(path)
    assert [one.name for one in session.get_inputs()] == ["images"]
    for count in (1, 2, 7):
        x = images(encoder, count)
        (features,) = session.run(["features"], {"images": x.numpy()})
        close(encoder(x), torch.from_numpy(features))
    assert np.array_equal(by_usage(export.Onnx(), encoder, path)(x.numpy()), features)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        dict(arch="resnet18", image_size=64, width=0.25),
        dict(arch="timm:test_vit", image_size=96),
        dict(arch="resnet50", image_size=64, width=0.125, variant="official", dialect="tf", sk_ratio=0.0625),
    ],
    ids=["resnet18", "vit", "selective kernels"],
)
def test_onnx_of_other_networks(tmp_path, recipe):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    encoder, path = trained(**recipe), tmp_path / "a.onnx"
    export.export(encoder, export.Onnx(), path)
    x = images(encoder, 3)
    (features,) = runtime.InferenceSession(path).run(None, {"images": x.numpy()})
    close(encoder(x), torch.from_numpy(features), 1e-4)


def test_more_weights_than_onnx_can_hold_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    monkeypatch.setattr(onnx_file, "LIMIT", 1000)
    with pytest.raises(
        ConfigError, match="format=onnx cannot express more than 2 GiB of weights, and these are 0.0 GiB"
    ):
        export.export(trained(**TINY), export.Onnx(), tmp_path / "a.onnx")


def test_other_features_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match="torchvision does not give the encoder's features: they differ by .*nothing"):
        export.export(trained(arch="resnet18", image_size=32), export.Torchvision(), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, run, capsys):
    out = tmp_path / "deep" / "a.safetensors"
    assert command(run, "safetensors", out) == 0
    said = capsys.readouterr().out
    assert f"resnet8 from {run}/checkpoints/last.pt, step 3, without its projection head: {out}" in said
    assert f'model = load("{out}")' in said
    again = load(out)
    assert (again.data, again.recipe.head) == ("birds", "none")
    assert torch.equal(again(images(again)), load(run)(images(again)))
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert command(run, "huggingface", tmp_path / "folder") == 0
    assert "| knn | birds | k = 20 | top-1 | 62.50% |" in (tmp_path / "folder" / "README.md").read_text()
    assert "somebody" not in "".join(
        p.read_text() for p in (tmp_path / "folder").iterdir() if p.suffix != ".safetensors"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("form", "package", "out"), [
    ("onnx", "onnxruntime", "a.onnx"), ("onnx", "onnx", "a.onnx"), ("safetensors", "safetensors", "a.safetensors"),
    ("huggingface", "safetensors", "a")])  # fmt: skip
def test_a_package_that_is_missing_is_named(tmp_path, run, monkeypatch, capsys, form, package, out):
    if package == "onnxruntime":
        pytest.importorskip("onnxscript", reason="needs the extra export")
    real = forms.importlib.import_module

    def absent(name):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name)

    monkeypatch.setattr(forms.importlib, "import_module", absent)
    assert command(run, form, tmp_path / out) == 2
    expected = f"format={form} needs {package}; install it with: pip install 'simclr_fast[export]'"
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reading_without_safetensors(tmp_path, monkeypatch):
    export.export(trained(**TINY), export.Safetensors(), tmp_path / "a.safetensors")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError("No module named 'safetensors'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"needs safetensors; install it with: pip install 'simclr_fast\[export\]'"):
        load(tmp_path / "a.safetensors")


def test_checkpoints_that_are_refused(tmp_path, capsys):
    assert command(tmp_path / "absent", "safetensors", tmp_path / "a.safetensors") == 2
    assert "checkpoint must be a run's folder or a checkpoint file that exists" in capsys.readouterr().err
    (tmp_path / "a.pt").write_bytes(b"none")
    assert command(tmp_path / "a.pt", "safetensors", tmp_path / "a.safetensors") == 2
    assert "cannot read" in capsys.readouterr().err

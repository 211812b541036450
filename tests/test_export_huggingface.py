"""The folder for Hugging Face: what its card says, and that timm and transformers read it."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from simclr_fast import export, load
from simclr_fast.config import ConfigError
from simclr_fast.evaluation.job import NEUTRAL
from simclr_fast.exporting import hugging_face
from tests.export_common import OFFICIAL, TINY, close, images, result, trained
from tests.train_common import jpeg


def snippets(folder: Path) -> list[str]:
    """The code in the model card."""
    return [part.split("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]


def test_hugging_face_folder(tmp_path, monkeypatch):
    encoder, folder = trained(**TINY), tmp_path / "birds"
    results = [result(encoder), result(encoder, weights="others", figures={"top-1": 0.5}), result(encoder)]
    export.export(encoder, export.HuggingFace(), folder, results)
    again = load(folder)
    assert torch.equal(again(images(encoder)), encoder(images(encoder)))
    assert again.recipe == encoder.recipe
    card = (folder / "README.md").read_text()
    assert card.count("| knn | birds | k = 20 | top-1 | 62.50% |") == 1
    assert "50.00%" not in card
    assert "architecture" not in json.loads((folder / "config.json").read_text())  # timm has no such network

    monkeypatch.chdir(folder)
    (folder / "image.jpg").write_bytes(jpeg(0, 40))
    (code,) = snippets(folder)
    scope: dict = {}
    exec(code, scope)
    assert torch.equal(scope["features"], encoder(encoder.preprocess("image.jpg")[None]))


def test_every_row_of_a_card_says_how_it_was_measured(tmp_path):
    encoder = trained(**TINY)
    few = {"labels": None, "subset": None, "from_layer": 0, "lr": 0.05}
    made = [
        ("knn", {"k": None, "temperature": 0.1}, {"neighbours": 200}), ("knn", {"k": 20, "temperature": 0.5}, {}),
        ("linear", {"mode": "exact"}, {}), ("linear", {"mode": "sgd"}, {}),
        ("transfer", {"mode": "linear"}, {}), ("transfer", {"mode": "finetune"}, {}), ("finetune", few, {}),
        ("finetune", few | {"labels": 10.0, "from_layer": 1}, {}), ("finetune", few | {"lr": 0.1}, {}),
        ("finetune", few | {"subset": "/home/somebody/list.txt"}, {}), ("probe", {"noise": 0.1}, {}),
    ]  # fmt: skip
    results = [result(encoder, protocol=p, settings=settings, counts=counts) for p, settings, counts in made]
    results += [result(encoder, data="cats", data_digest=digest) for digest in ("4 images (a)", "5 images (b)")]
    export.export(encoder, export.HuggingFace(), tmp_path / "a", results)
    card = (tmp_path / "a" / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (?:birds|cats) \| (.*) \| top-1 \| 62\.50% \|$", card, re.M)
    assert rows == [
        ("knn", "k = 200, temperature 0.1"), ("knn", "k = 20, temperature 0.5"),
        ("linear", "weights frozen, logistic regression"), ("linear", "weights frozen, sgd"),
        ("transfer", "weights frozen, logistic regression"), ("transfer", "all weights trained"),
        ("finetune", "all weights trained, 1 % of the labels, lr 0.05"),
        ("finetune", "all weights trained, 10 % of the labels, from layer 1 of the head, lr 0.05"),
        ("finetune", "all weights trained, 1 % of the labels, lr 0.1"),
        ("finetune", "all weights trained, labels of list.txt, lr 0.05"), ("probe", ""),
        ("knn", "k = 20, temperature 0.1, 4 images (a)"), ("knn", "k = 20, temperature 0.1, 5 images (b)"),
    ]  # fmt: skip
    assert "somebody" not in card


def how(encoder, *results: dict) -> list[str]:
    """What a card says of each result."""
    card = hugging_face.model_card(encoder, results)
    return re.findall(r"^\| \w+ \| birds \| (.*) \| top-1 \| 62\.50% \|$", card, re.M)


ASKED = {
    "image_size": ("knn", {"image_size": 64}, "k = 20, image_size 64"),
    "temperature": ("knn", {"k": 20, "temperature": 1.0}, "k = 20, temperature 1"),
    "layer": ("knn", {"layer": "z", "seed": 3}, "k = 20, seed 3, layer z"),
    "precision": ("knn", {"precision": "fp32"}, "k = 20, precision fp32"),
    "l2": ("linear", {"mode": "exact", "l2": 2.5}, "weights frozen, logistic regression, l2 2.5"),
    "epochs": ("linear", {"mode": "sgd", "epochs": 1}, "weights frozen, sgd, epochs 1"),
    "batch": ("linear", {"mode": "sgd", "batch": 256}, "weights frozen, sgd, batch 256"),
    "steps": ("transfer", {"mode": "finetune", "steps": 10}, "all weights trained, steps 10"),
    "lrs": ("transfer", {"mode": "finetune", "lrs": [0.1, 0.01]}, "all weights trained, lrs 0.1 0.01"),
    "labels": ("finetune", {"labels": 1.0, "epochs": 60}, "all weights trained, 1 % of the labels, epochs 60"),
    "noise": ("probe", {"noise": 0.5, "pictures": False}, "noise 0.5"),
    "of the other mode": ("linear", {"mode": "exact", "epochs": 1}, "weights frozen, logistic regression"),
    "of another version": ("knn", {"metric": "l1"}, "k = 20, metric l1"),
}  # fmt: skip


@pytest.mark.parametrize(("protocol", "settings", "said"), ASKED.values(), ids=ASKED)
def test_a_card_names_what_is_not_the_default(protocol, settings, said):
    encoder = trained(**TINY)
    mode = f"{protocol} {settings['mode']}" if "mode" in settings else protocol
    defaults = hugging_face.COMMON | hugging_face.DEFAULTS[mode]
    (found,) = how(encoder, result(encoder, protocol=protocol, settings=defaults | settings))
    assert found == said


WORDS = {
    "knn": "k = 20",
    "linear exact": "weights frozen, logistic regression",
    "linear sgd": "weights frozen, sgd",
    "finetune": "all weights trained, 1 % of the labels",
    "transfer linear": "weights frozen, logistic regression",
    "transfer finetune": "all weights trained",
    "probe": "",
}


@pytest.mark.parametrize("resolved", [False, True])
@pytest.mark.parametrize("kind", WORDS)
def test_a_card_does_not_name_the_defaults(kind, resolved):
    protocol, _, mode = kind.partition(" ")
    settings = {"mode": mode or None, "arch": "resnet8", "width": 0.125}
    settings |= {"k": 20, "labels": 1.0} if resolved else {"k": None, "labels": None}
    encoder = trained(**TINY)
    settings |= hugging_face.COMMON | hugging_face.DEFAULTS[kind]
    assert how(encoder, result(encoder, protocol=protocol, settings=settings)) == [WORDS[kind]]


def test_what_auto_came_to_is_said():
    encoder = trained(**TINY)
    results = [result(encoder, settings={"precision": "auto"}, precision=name) for name in ("bf16", "fp32")]
    assert how(encoder, *results) == ["k = 20, precision bf16", "k = 20, precision fp32"]


@pytest.mark.parametrize("protocol", ["knn", "linear", "finetune", "transfer", "probe"])
def test_the_defaults_are_those_of_the_protocols(protocol):
    settings = importlib.import_module(f"simclr_fast.evaluation.{protocol}").Settings(checkpoint="a.pt")
    own = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in {*NEUTRAL, *hugging_face.SAID}
    }
    kinds = [kind for kind in hugging_face.DEFAULTS if kind.split()[0] == protocol]
    modes = get_args(get_type_hints(type(settings)).get("mode"))
    assert kinds == ([f"{protocol} {mode}" for mode in modes] or [protocol])
    known = dict(hugging_face.COMMON)
    for kind in kinds:
        known |= hugging_face.DEFAULTS[kind]
    assert known == own


def test_a_folder_whose_weights_were_written_anew(tmp_path):
    from safetensors.torch import load_file, save_file

    encoder, folder = trained(**TINY), tmp_path / "a"
    export.export(encoder, export.HuggingFace(), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load(folder)(images(encoder)), encoder(images(encoder)))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors has no such settings: give --arch"):
        load(folder)
    assert load(folder, **TINY).digest() == encoder.digest()


def test_a_card_without_results_says_so(tmp_path):
    export.export(trained(**TINY), export.HuggingFace(), tmp_path / "a")
    assert "Nothing was measured with these weights." in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    "recipe",
    [
        dict(arch="resnet18", image_size=56),
        dict(arch="timm:test_vit", image_size=112),
        pytest.param(dict(image_size=70, **OFFICIAL), marks=pytest.mark.slow),
    ],
    ids=["resnet18", "vit", "official"],
)
def test_timm_reads_the_folder(tmp_path, monkeypatch, recipe):
    encoder, folder = trained(**recipe), tmp_path / "a"
    export.export(encoder, export.HuggingFace(), folder)
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(snippets(folder)[1], scope)
    model, x = scope["model"], images(encoder)
    with torch.no_grad():
        close(encoder(x), model(x))
    settings = timm.data.resolve_model_data_config(model)
    assert tuple(settings["input_size"]) == (3, encoder.image_size, encoder.image_size)
    assert (settings["crop_pct"], settings["interpolation"]) == (0.875, "bicubic")
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (encoder.policy.mean, encoder.policy.std)
    strict = timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_strict=True)
    assert not strict.num_classes
    picture = smooth(360, 288)
    near(encoder.preprocess(picture), scope["transform"](picture))
    with pytest.raises(AssertionError):
        near(encoder.preprocess(picture), scope["transform"](picture.crop((9, 9, 279, 351))))


def test_a_stem_for_small_images_is_explained(tmp_path, monkeypatch):
    encoder, folder = trained(arch="resnet18", image_size=32), tmp_path / "a"
    export.export(encoder, export.HuggingFace(), folder)
    monkeypatch.chdir(folder)
    _, code = snippets(folder)
    scope: dict = {}
    exec(code, scope)
    with torch.no_grad():
        close(encoder(images(encoder)), scope["model"](images(encoder)))


def smooth(height: int, width: int) -> Image.Image:
    """A picture without sharp edges."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17) + np.cos(y / 23), np.sin((x + y) / 31), np.cos(x / 11 - y / 29)]
    return Image.fromarray((127 + 50 * np.stack(waves, -1)).astype(np.uint8))


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same crop, which theirs cuts out of the resized image, of 8 bits; of these sizes at the same place."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().mean()) < 0.01 * float(ours.std())


def test_transformers_reads_the_preprocessing(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra peers")
    encoder = trained(**(TINY | dict(image_size=56)))
    export.export(encoder, export.HuggingFace(), tmp_path / "a")
    picture = smooth(360, 288)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")
    near(encoder.preprocess(picture), processor(picture, return_tensors="pt")["pixel_values"][0])


def test_a_card_says_that_a_set_is_not_the_papers(tmp_path):
    encoder = trained(**TINY)
    notes = ["DTD: not the paper's set: 3 classes, not 47"]
    results = [result(encoder, protocol="transfer", settings={"mode": "linear"}, notes=notes),
               result(encoder, notes=["of /home/somebody"])]  # fmt: skip
    export.export(encoder, export.HuggingFace(), tmp_path / "a", results)
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"|\n\n- {notes[0]}\n" in card
    assert "somebody" not in card

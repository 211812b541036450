"""A folder as on the Hugging Face Hub: weights, settings, preprocessing, and a card with what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simclr_fast.exporting.format import (
    Format,
    about,
    crop_share,
    needed,
    preprocessing,
    preprocessing_sentence,
)
from simclr_fast.exporting.state_dicts import Torchvision, differs, misfit, timm_name, timm_options
from simclr_fast.exporting.tensors import write_tensors
from simclr_fast.pretrained import MODEL, Encoder, Recipe

CONFIG, PREPROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
BICUBIC = 3  # Pillow's number
TRAINED = "all weights trained"
SAID = ("k", "mode", "labels", "subset", "from_layer", "sets", "arch", "width", "pictures")
"""Settings that a card says in words, or that no figure depends on."""
COMMON = {"seed": 0, "precision": "auto", "image_size": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "knn": {"temperature": 0.1, "layer": "h"},
    "linear exact": {"holdout": 0.1, "l2": None},
    "linear sgd": {"batch": None, "epochs": 90, "lr": 0.1, "weight_decay": 0.0},
    "finetune": {"batch": None, "epochs": None, "lr": 0.05, "weight_decay": 0.0},
    "transfer linear": {},
    "transfer finetune": {
        "steps": 20_000,
        "batch": None,
        "lrs": [1e-4, 3.162e-4, 1e-3, 3.162e-3, 1e-2, 3.162e-2, 0.1],
        "decays": [0.0, 1e-6, 3.162e-6, 1e-5, 3.162e-5, 1e-4, 3.162e-4, 1e-3],
    },
    "probe": {"images": 20_000, "test_images": 10_000, "classifier": "mlp", "noise": 0.1},
}
"""Of the settings that count, by the protocol and its mode; what differs from them, a card names."""


class HuggingFace(Format):
    """`load` reads it, and timm does where it has the network."""

    files = (CONFIG, MODEL, PREPROCESSOR, CARD)

    def check(self, recipe: Recipe) -> None:
        needed("safetensors", "format=huggingface")

    def write(self, encoder: Encoder, path: Path, results: Sequence[dict[str, Any]]) -> str:
        path.mkdir()
        config = {"num_features": encoder.num_features} | timm_config(encoder) | {"simclr_fast": about(encoder)}
        for name, content in (CONFIG, config), (PREPROCESSOR, preprocessor(encoder)):
            (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (path / CARD).write_text(model_card(encoder, results), encoding="utf-8")
        write_tensors(encoder, path / MODEL, "format=huggingface")
        return ""

    def usage(self, encoder: Encoder, path: Path) -> list[str]:
        return ["from simclr_fast import load", f"model = load({json.dumps(str(path))})"]


def timm_reads(recipe: Recipe) -> bool:
    """Whether timm has the network as it is."""
    return not misfit(recipe) and not differs(recipe)


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` takes a model and its preprocessing from, or nothing."""
    recipe, side = encoder.recipe, encoder.image_size
    if not timm_reads(recipe):
        return {}
    options = timm_options(recipe)
    trained = {
        "tag": "simclr", "custom_load": False, "num_classes": 0, "input_size": [3, side, side], "crop_mode": "center",
        "fixed_input_size": "img_size" in options, "pool_size": None, "first_conv": None, "classifier": None,
        **preprocessing(encoder),
    }  # fmt: skip
    return {"architecture": timm_name(recipe).split(".")[0], "model_args": options, "pretrained_cfg": trained} | options


def preprocessor(encoder: Encoder) -> dict[str, Any]:
    """As transformers' image processors have it: the shorter side resized, then the centre cut out."""
    side, share = encoder.image_size, crop_share(encoder)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": round(side / share)}, "resample": BICUBIC, "crop_pct": share,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(encoder.policy.mean), "image_std": list(encoder.policy.std),
    }  # fmt: skip


def model_card(encoder: Encoder, results: Sequence[dict[str, Any]]) -> str:
    """README.md: what the encoder is, what was measured with these weights, and how to load it."""
    recipe, known = encoder.recipe, about(encoder)
    timm = timm_reads(recipe)
    facts = {
        "network": f"{recipe.arch}, width {recipe.width:g}" + (", official" if recipe.variant == "official" else ""),
        "features": f"{encoder.num_features}, before the projection head, which is left out",
        "images": preprocessing_sentence(encoder),
        "trained on": encoder.data or "unknown",
        "training step": "unknown" if encoder.step is None else f"{encoder.step:,}",
        "weights": f"sha256 {known['weights']}",
        "written by": f"simclr_fast {known['version']}",
    }
    lines = [
        "---", f"library_name: {'timm' if timm else 'simclr_fast'}", "pipeline_tag: image-feature-extraction",
        "tags:", "- simclr", "- self-supervised-learning", "---",
        "", f"# {recipe.arch}, pretrained with SimCLR", "",
        "An image encoder, trained without labels (Chen et al. 2020, arXiv:2002.05709).", "",
        "| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in facts.items()),
        "", "## Measured", "", *(_measured(results) or ["Nothing was measured with these weights."]),
        "", "## Use", "", "In this folder:", "", "```python",
        "from simclr_fast import load", 'encoder = load(".")',
        'features = encoder(encoder.preprocess("image.jpg")[None])', "```",
    ]  # fmt: skip
    if timm:
        lines += ["", "or with timm:", "", "```python", "import timm",
                  'model = timm.create_model("local-dir:.", pretrained=True).eval()',
                  "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
                  "```"]  # fmt: skip
    elif not misfit(recipe):
        made = Torchvision().made(recipe, f'safetensors.torch.load_file("{MODEL}")')
        lines += [
            "",
            "or with torchvision:",
            "",
            "```python",
            "import safetensors.torch, torch, torchvision",
            *made,
            "```",
        ]
    return "\n".join(lines) + "\n"


def _measured(results: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the figures; each row says how they were measured."""
    rows = []
    for result in results:
        cells = [result["protocol"], result["data"], ", ".join([*_how(result), *_named(result, results)])]
        rows += [[*cells, name, f"{value:.2%}"] for name, value in result["figures"].items()]
    lines = dict.fromkeys(f"| {' | '.join(map(_cell, row))} |" for row in rows)
    notes = dict.fromkeys(note for one in results if one["protocol"] == "transfer" for note in one.get("notes") or [])
    table = ["| protocol | data | how | figure | |", "|---|---|---|---|---|", *lines] if rows else []
    return [*table, *([""] if notes else []), *(f"- {note}" for note in notes)]


def _how(result: dict[str, Any]) -> list[str]:
    """What the protocol did with the encoder, in words."""
    settings, counts, protocol = result.get("settings") or {}, result.get("counts") or {}, result["protocol"]
    k, mode, layer = (settings.get(name) for name in ("k", "mode", "from_layer"))
    if protocol == "knn":
        return [f"k = {counts.get('neighbours', k)}"]
    if protocol == "linear" and mode == "sgd":
        return ["weights frozen", "sgd"]
    if protocol == "linear" or (protocol == "transfer" and mode != "finetune"):
        return ["weights frozen", "logistic regression"]
    if protocol == "transfer":
        return [TRAINED]
    if protocol == "finetune":
        listed = settings.get("subset")
        share = f"labels of {Path(listed).name}" if listed else f"{settings.get('labels') or 1:g} % of the labels"
        return [TRAINED, share, *([f"from layer {layer} of the head"] if layer else [])]
    return []


def _named(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    """Its settings that are not the defaults or differ among results of its kind, and which images are meant where a
    name has several."""
    defaults = COMMON | DEFAULTS.get(_kind(result), {})
    alike = [_counting(one) for one in results if _kind(one) == _kind(result)]
    settings = [
        f"{name} {_text(value)}"
        for name, value in _counting(result).items()
        if value != defaults.get(name) or any(one.get(name) != value for one in alike)
    ]
    digest = result.get("data_digest")
    others = any(one["data"] == result["data"] and one.get("data_digest") != digest for one in results)
    return [*settings, *([digest] if digest and others else [])]


def _counting(result: dict[str, Any]) -> dict[str, Any]:
    """Its settings that were given or resolved, count in its mode, and are not said otherwise."""
    kind, settings = _kind(result), dict(result.get("settings") or {})
    if settings.get("precision") == "auto" and result.get("precision"):
        settings["precision"] = result["precision"]
    known = {name for other, names in DEFAULTS.items() if other.split()[0] == result["protocol"] for name in names}
    idle = known - DEFAULTS[kind].keys() if kind in DEFAULTS else set()
    return {name: value for name, value in settings.items() if name not in {*SAID, *idle} and value is not None}


def _kind(result: dict[str, Any]) -> str:
    """Its protocol, and the mode where there are several."""
    mode = (result.get("settings") or {}).get("mode")
    return f"{result['protocol']} {mode}" if mode else str(result["protocol"])


def _text(value: Any) -> str:
    """A setting's value; several with spaces between, as on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

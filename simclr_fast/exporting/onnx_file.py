"""ONNX: images [batch, 3, S, S] float32 to features [batch, d], compared in onnxruntime when it is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simclr_fast.config import ConfigError
from simclr_fast.exporting.format import Format, card, compared, needed, probe, shown
from simclr_fast.pretrained import Encoder, Recipe

OPSET = 18
LIMIT = 2**31 - 2**20  # bytes of one file, by the format of messages that it is


class Onnx(Format):
    """A graph of plain operators; the batch may have any size, the images have one."""

    suffixes = (".onnx",)

    def check(self, recipe: Recipe) -> None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needed(package, "format=onnx")

    def write(self, encoder: Encoder, path: Path, results: Sequence[dict[str, Any]]) -> str:
        size = sum(tensor.nbytes for tensor in encoder.network.state_dict().values())
        if size > LIMIT:
            raise ConfigError(
                f"format=onnx cannot express more than 2 GiB of weights, and these are {size / 2**30:.1f} GiB"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts, about each other
            program = torch.onnx.export(
                encoder.network,
                (probe(encoder),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(card(encoder))
        program.save(str(path), external_data=False)
        runtime = needed("onnxruntime", "format=onnx")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = 0.0
        for count in (1, 3):
            images = probe(encoder, count)
            (features,) = session.run(["features"], {"images": images.numpy()})
            worst = max(worst, compared(encoder, images, torch.from_numpy(features), "onnxruntime"))
        return f"checked: onnxruntime gives the encoder's features, {shown(worst)}; opset {OPSET}"

    def usage(self, encoder: Encoder, path: Path) -> list[str]:
        return [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({json.dumps(str(path))})",
            'model = lambda images: session.run(["features"], {"images": images})[0]  # float32 [batch, 3, '
            f"{encoder.image_size}, {encoder.image_size}]",
        ]

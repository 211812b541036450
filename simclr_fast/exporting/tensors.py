"""One safetensors file, whose metadata is a card of the encoder; `load` and `--init` read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simclr_fast.exporting.format import Format, card, needed, weights
from simclr_fast.models.weights import SAFETENSORS
from simclr_fast.pretrained import Encoder, Recipe


def write_tensors(encoder: Encoder, path: Path, what: str) -> None:
    """The weights with their card.

    Args:
        what: is written, for the message that the package is missing.
    Raises:
        ConfigError: it is.
        OSError: the file cannot be written; the package's own writer has another kind for that.
    """
    path.write_bytes(needed("safetensors.torch", what).save(weights(encoder), metadata=card(encoder)))


class Safetensors(Format):
    """The weights by the network's own names."""

    suffixes = (SAFETENSORS,)

    def check(self, recipe: Recipe) -> None:
        needed("safetensors", "format=safetensors")

    def write(self, encoder: Encoder, path: Path, results: Sequence[dict[str, Any]]) -> str:
        write_tensors(encoder, path, "format=safetensors")
        return ""

    def usage(self, encoder: Encoder, path: Path) -> list[str]:
        return ["from simclr_fast import load", f"model = load({json.dumps(str(path))})"]

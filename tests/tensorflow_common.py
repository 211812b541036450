"""Official checkpoints for tests: variables by TensorFlow's names, with the values behind the vectors."""

import json
import zlib
from pathlib import Path

import numpy as np


def official_variables(vectors: Path, net: str) -> dict[str, np.ndarray]:
    """All of a network of `net_vars.json`; the rule of their values stands in the vectors' README."""
    listed = json.loads((vectors / "net_vars.json").read_text())[net]
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in listed["trainable"]}
    for name in listed["non_trainable"]:
        shapes[name] = shapes[f"{name.rsplit('/', 1)[0]}/gamma"]
    return {name: vector_weight(name, shape) for name, shape in shapes.items()}


def vector_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights behind the vectors, drawn from their name; the rule is in the vectors' README."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    match name.rsplit("/", 1)[1]:
        case "kernel":
            return rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
        case "gamma" | "moving_variance":
            return 0.5 + rng.random(shape)
        case _:
            return 0.1 * rng.standard_normal(shape)

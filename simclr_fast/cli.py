"""From the command line to settings: a preset or a config.json first, then the flags over it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from simclr_fast import methods
from simclr_fast.config import Config, ConfigError, choose
from simclr_fast.data import KNOWN


def parse(module: str, argv: Sequence[str]) -> Config:
    """The settings: those of the preset or of --config, and the flags over them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("method", "preset", "data", "config", "arch"):
        first.add_argument(f"--{flag}")
    given = first.parse_known_args(argv)[0]
    if given.config and given.preset:
        raise ConfigError(f"preset must not be given with config, which holds every setting, got {given.preset!r}")
    saved = saved_settings(Path(given.config)) if given.config else {}
    method = methods.load(given.method or saved.get("method", Config.method))
    data = given.data or saved.get("data", Config.data)
    preset = choose("preset", given.preset or Config.preset, ["auto", *method.PRESETS])
    start = ("shapes" if data == "shapes" else "none") if preset == "auto" else preset
    values = dict(saved or method.PRESETS[start])
    if not saved and given.arch not in (None, values.get("arch")):
        values.pop("width", None)  # a preset's is that of its own network
    default = method.Config.of(values, given.config or f"preset {start}")
    cfg = tyro.cli(method.Config, prog=f"python -m {module}", default=default, args=list(argv))
    paths = {} if cfg.data in KNOWN else {"data": cfg.data}
    paths |= {"init": cfg.init} if cfg.init else {}
    found = {name: str(Path(path).resolve()) for name, path in paths.items() if Path(path).exists()}
    return dataclasses.replace(cfg, **found)


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.json, without those that belong to the folder it lies in."""
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"config must be a readable config.json, got config={path}: {error}") from error
    return {name: value for name, value in values.items() if name not in ("out", "resume", "config")}

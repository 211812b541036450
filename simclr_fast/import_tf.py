"""Take over an official TensorFlow checkpoint of SimCLR v1 or v2: `python -m simclr_fast.import_tf SOURCE OUT.pt`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from simclr_fast.command import ended
from simclr_fast.config import ConfigError
from simclr_fast.exporting.target import check_target, whole, write_state
from simclr_fast.models import SMALL_IMAGE
from simclr_fast.models.tensorflow import SLOT, Imported, imported
from simclr_fast.pretrained import Recipe

MODULE = "simclr_fast.import_tf"
IMAGE_SIZES = {"imagenet": 224, "small": 32}  # of the official training, by the stem
OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"  # in checkpoints that know variables by their places in Python objects


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The variables of an official SimCLR network, v1 or v2, as a file that `load`, `evaluate --checkpoint`, `embed`
    and `export` take. Depth, width, stem, head and selective kernels are found from the variables."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A .npz of arrays by TensorFlow's names; or, with the extra `tf`, a checkpoint (its prefix, or the folder it lies
    in) or a SavedModel's folder."""

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT.pt")]]
    """The file to write, .pt."""

    image_size: int | None = None
    """Side of the images. Without it: 224, or 32 for the stem for small images."""

    overwrite: bool = False
    """Replace what is there."""


def convert(variables: Mapping[str, np.ndarray], image_size: int | None = None) -> dict[str, Any]:
    """What the file holds: {"recipe": fields of `Recipe`, "method": tensors by our names}.

    Args:
        variables: by TensorFlow's names, such as base_model/conv2d/kernel; float arrays in its layouts.
        image_size: side of the images; None is that of the official training.
    Raises:
        ConfigError: they are not those of an official network; what is missing, unknown or of another shape is named.
    """
    return _converted(imported(variables), image_size)


def _converted(found: Imported, image_size: int | None) -> dict[str, Any]:
    known = dict(found.recipe)
    stem = known.pop("stem")
    size = IMAGE_SIZES[stem] if image_size is None else image_size
    if size < 1 or (size <= SMALL_IMAGE) != (stem == "small"):
        rule = f"1 to {SMALL_IMAGE}" if stem == "small" else f"over {SMALL_IMAGE}"
        raise ConfigError(f"image_size must be {rule} for the {stem} stem that the source has, got {image_size=}")
    recipe = Recipe(**known, image_size=size, variant="official", dialect="tf")
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.zeros((), dtype=torch.int64)
        for name in found.state
        if name.endswith("running_var")
    }
    return {"recipe": dataclasses.asdict(recipe), "method": found.state | counters}


def read(source: str) -> dict[str, np.ndarray]:
    """The variables of a .npz, a TensorFlow checkpoint or a SavedModel, by name.

    Raises:
        ConfigError: it is none of these, or cannot be read; TensorFlow is missing.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _arrays(path)
    prefix = _prefix(path)
    try:
        import tensorflow
    except ImportError as error:
        raise ConfigError(
            f"source={source} needs TensorFlow; install it with: pip install 'simclr_fast[tf]', or give a .npz"
        ) from error
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        names = list(reader.get_variable_to_shape_map())
        if OBJECTS not in names:
            return {name: reader.get_tensor(name) for name in names}
        if not (path / "saved_model.pb").is_file():
            raise ConfigError(
                f"source must have names for its variables, and {path} has none; give the SavedModel's folder"
            )
        return _variables(tensorflow.saved_model.load(str(path)), tensorflow.Variable)
    except ConfigError:
        raise
    except Exception as error:  # TensorFlow has kinds of its own
        raise ConfigError(f"source cannot be read, {path}: {' '.join(str(error).split())}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz, by name."""
    try:
        with open(path, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            found = {name: file[name] for name in file.files} if isinstance(file, np.lib.npyio.NpzFile) else None
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for damaged files
        raise ConfigError(f"source cannot be read, {path}: {' '.join(str(error).split())}") from error
    if found is None:
        raise ConfigError(f"source must be a .npz of arrays by their names, and {path} holds one array without a name")
    for name, value in found.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise ConfigError(f"source must hold arrays of real numbers alone, and {name} in {path} is none")
    return found


def _variables(root: Any, kind: Any) -> dict[str, np.ndarray]:
    """All variables of what a SavedModel holds, by name."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [root], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if not isinstance(one, kind):
            waiting += one._trackable_children().values()
        elif one.name in found:
            raise ConfigError(f"source must have a name of its own for each variable, got {one.name} twice")
        else:
            found[one.name] = one.numpy()
    return found


def _prefix(path: Path) -> Path:
    """What TensorFlow calls a checkpoint: the common part of its files' names."""
    if (path / "saved_model.pb").is_file():
        return path / "variables" / "variables"
    if path.is_dir():
        found = sorted(path.glob("*.index"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise ConfigError(
                f"source must be a folder with saved_model.pb or a checkpoint (*.index), and {path} has none"
            )
        return found[-1].with_suffix("")
    prefix = path.with_suffix("") if path.suffix in (".index", ".meta") else path
    if not Path(f"{prefix}.index").is_file():
        raise ConfigError(f"source must be a .npz, a TensorFlow checkpoint or a SavedModel's folder, got {str(path)!r}")
    return prefix


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read and write; returns the exit status."""
    return ended(lambda _: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    settings = tyro.cli(Settings, prog=f"python -m {MODULE}", args=argv)
    out = Path(settings.out).expanduser()
    check_target(out, overwrite=settings.overwrite, suffixes=(".pt",))
    found = imported(read(settings.source))
    state = _converted(found, settings.image_size)
    with whole(out) as partial:
        write_state(state, partial)
    recipe = Recipe(**state["recipe"])
    parts = [recipe.arch, f"width {recipe.width:g}", f"{recipe.image_size} px"]
    parts += [f"selective kernels {recipe.sk_ratio:g}"] if recipe.sk_ratio else []
    parts += ["no head" if recipe.head == "none" else f"{recipe.head} head of {recipe.head_layers} layers"]
    print(f"{', '.join(parts)}: {len(found.state)} tensors, {out}")
    if found.dropped:
        print(f"left out, {len(found.dropped)}: {', '.join(_families(found.dropped))}")
    return 0


def _families(names: list[str]) -> list[str]:
    """The names, an optimiser's slots once for all variables."""
    slots = {match[1] for name in names if (match := SLOT.search(name))}
    return [f"*/{slot}" for slot in sorted(slots)] + sorted(name for name in names if not SLOT.search(name))


if __name__ == "__main__":
    sys.exit(main())

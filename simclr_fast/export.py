"""Write an encoder for use elsewhere: `python -m simclr_fast.export --checkpoint RUN --format FORMAT OUT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simclr_fast.command import ended
from simclr_fast.evaluation.results import read_all
from simclr_fast.exporting.format import Format
from simclr_fast.exporting.hugging_face import HuggingFace
from simclr_fast.exporting.onnx_file import Onnx
from simclr_fast.exporting.state_dicts import Timm, Torchvision
from simclr_fast.exporting.target import check_target, whole
from simclr_fast.exporting.tensors import Safetensors
from simclr_fast.pretrained import Encoder, EncoderFlags, run_folder

MODULE = "simclr_fast.export"
FORMATS: dict[str, type[Format]] = {
    "torchvision": Torchvision,
    "timm": Timm,
    "safetensors": Safetensors,
    "onnx": Onnx,
    "huggingface": HuggingFace,
}


@dataclass(frozen=True, kw_only=True)
class Settings(EncoderFlags):
    """The encoder of a run, without the projection head, as a file or a folder that other programs load."""

    format: Literal["torchvision", "timm", "safetensors", "onnx", "huggingface"]
    """`torchvision` and `timm`: a state dict (.pth) for their own models. `safetensors`: one file with a card, which
    `load` and --init take too. `onnx`: checked with onnxruntime. `huggingface`: a folder with settings, preprocessing
    and a model card that shows what `evaluate` has measured."""

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """What to write."""

    overwrite: bool = False
    """Replace what is there."""


def export(encoder: Encoder, form: Format, out: Path, results: Sequence[dict[str, Any]] = ()) -> str:
    """Write the encoder, whole or not at all; returns what was checked.

    Args:
        encoder: as `load` gives it: in eval mode, on the CPU.
        results: as `evaluate` writes them; those of other weights are left out.
    Raises:
        ConfigError: the format cannot express it.
        OSError: it cannot be written.
    """
    form.check(encoder.recipe)
    own = [result for result in results if result.get("weights") == encoder.digest()]
    with whole(out) as partial:
        return form.write(encoder, partial, own)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check and write; returns the exit status."""
    return ended(lambda _: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    settings = tyro.cli(Settings, prog=f"python -m {MODULE}", args=argv)
    form, out = FORMATS[settings.format](), Path(settings.out).expanduser()
    check_target(out, overwrite=settings.overwrite, suffixes=form.suffixes, files=form.files)
    encoder = settings.encoder()
    run = run_folder(settings.checkpoint)
    results = read_all(run / "evaluations") if run is not None else []
    checked = export(encoder, form, out, results)
    at = f", step {encoder.step:,}" if encoder.step is not None else ""
    print(f"{encoder.recipe.arch} from {encoder.origin}{at}, without its projection head: {out}")
    lines = form.usage(encoder, out)
    print("\n".join([*([checked] if checked else []), "", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m simclr_fast.data preview|pack|check`: look at views, write shards, check a set."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from simclr_fast.config import ConfigError, choose
from simclr_fast.data.commands.audit import check
from simclr_fast.data.commands.pack import Packing, pack
from simclr_fast.data.commands.preview import write_preview
from simclr_fast.data.commands.shards import MANIFEST, replace_text
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import KNOWN, TOLERATE, DataError, Dataset, open_dataset
from simclr_fast.data.sources.samples import shown

PROG = "python -m simclr_fast.data"
OVERVIEW = f"""usage: {PROG} COMMAND ...

commands:
  preview DATA OUT.html  a page of images and their augmented views, with the parameters of each view
  pack SRC DST           shuffled, indexed tar shards of a data set
  check DATA             what a data set holds, and what is wrong with it

{PROG} COMMAND --help explains one."""
PREVIEW = """Write one HTML page, which needs nothing else, with images of a data set and the two views that
training makes of each: by DALI and by torchvision side by side, how far the two differ, and what was drawn at random:
the crop (a frame on the original), the flip, the factors of the colour jitter in their order, gray, and the blur."""
PACK = """Write a data set as tar shards that --data takes, and DALI's and other webdataset readers:
train-000000.tar, ... and test-000000.tar, ..., an index beside each (as wds2idx writes it) and manifest.json with
their checksums. Images are shuffled over the whole set. They keep their bytes, unless --short-side makes them smaller.

The same command goes on where it was stopped, and writes damaged shards again; a shard never stands half under its
name. DST must be empty, or hold shards of the same images and settings."""
CHECK = """Read every image of a data set and report: images, classes, formats, sizes, images that cannot be read,
images that are there several times, and small ones. Of packed shards, checksums and indices are compared with the
manifest.

The exit status is 0 if all is clean, 1 if an image cannot be read or a shard is not as its manifest says, and 2 if the
set cannot be opened or the report not be written. Images left out that can be read are named; they are no fault."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(OVERVIEW, file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        parser = COMMANDS[choose("command", argv[0], COMMANDS)]()
        given, unknown = parser.parse_known_args(argv[1:])
        for text in unknown:
            if text.startswith("-"):
                choose("flag", text.partition("=")[0], [flag for flag in _flags(parser) if flag.startswith("--")])
            raise ConfigError(f"{argv[0]} takes no further argument, got {text!r}")
        status: int = given.run(given)
        sys.stdout.flush()
        return status
    except (ConfigError, DataError) as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        with suppress(OSError):  # what is left to write at the exit goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: the output was closed before all was written", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # a folder without permission, `~` of no user, an engine's failure
        print(f"error: {shown(' '.join(str(error).split()) or type(error).__name__)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _parser(command: str, description: str, run: Callable[[argparse.Namespace], int]) -> _Parser:
    parser = _Parser(
        prog=f"{PROG} {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    data = "a folder, a tar, a folder of tars, a list of images, or a known name such as shapes"
    parser.add_argument("data", metavar="SRC" if command == "pack" else "DATA", help=data)
    return parser


def _shared(parser: _Parser, tolerate: bool = True) -> _Parser:
    """With the flags of every command, last."""
    number = _number(int, 0)
    parser.add_argument(
        "--workers", type=number, default=0, metavar="N", help="threads or processes; 0: one for each core"
    )
    parser.add_argument("--download", action="store_true", help="fetch a data set that is known by name")
    if tolerate:
        text = "share of the images that may be unreadable (%(default)s)"
        share = _number(float, 0, 1)
        parser.add_argument("--tolerate-unreadable", type=share, default=TOLERATE, metavar="F", help=text)
    return parser


def _number(kind: type[int] | type[float], least: float, most: float = float("inf")) -> Callable[[str], Any]:
    """A reader of numbers in [least, most]."""
    rule = f"in [{least:g}, {most:g}]" if most < float("inf") else f"at least {least:g}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {rule}, got {text!r}")
        return value

    return read


def _one_of(what: str, options: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        try:
            return choose(what, text, options)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _preview() -> _Parser:
    parser, default = _parser("preview", PREVIEW, _run_preview), Policy(224)
    add = parser.add_argument
    add("out", metavar="OUT.html", help="the page to write")
    add("--count", type=_number(int, 1, 1000), default=8, metavar="N", help="images (%(default)s)")
    add("--image-size", type=_number(int, 1, 4096), default=224, metavar="S", help="side of a view, px (%(default)s)")
    add("--seed", type=_number(int, 0, 2**31 - 1), default=0, metavar="N", help="of the run (%(default)s)")
    add("--epoch", type=_number(int, 0, 2**31 - 1), default=0, metavar="N", help="whose views to show (%(default)s)")
    dialects = ("torchvision", "tf")
    text = "whose definitions the operators follow: torchvision or tf (%(default)s)"
    add("--dialect", type=_one_of("dialect", dialects), default=default.dialect, metavar="NAME", help=text)
    add("--jitter", type=_number(float, 0, 1.25), default=1.0, metavar="F", help="strength of the colour jitter (1.0)")
    add("--blur", type=_number(float, 0, 1), default=0.5, metavar="P", help="probability of the blur (0.5)")
    text = "smallest area of a crop, as a fraction of the image (0.08)"
    add("--min-area", type=_number(float, 1e-6, 1), default=0.08, metavar="F", help=text)
    return _shared(parser)


def _pack() -> _Parser:
    parser = _parser("pack", PACK, _run_pack)
    add = parser.add_argument
    add("folder", metavar="DST", help="the folder to write; it is made if it is not there")
    add("--seed", type=_number(int, 0), default=0, metavar="N", help="of the order (%(default)s)")
    text = "largest size of a shard in MiB (%(default)g)"
    add("--shard-mib", type=_number(float, 1e-3), default=256.0, metavar="M", help=text)
    add("--per-shard", type=_number(int, 1), metavar="N", help="images in a shard, in place of --shard-mib")
    text = """make images whose short side is longer than S pixels that small, bicubically, and write them as JPEGs;
others keep their bytes. Neither is the EXIF orientation applied nor the colour profile kept, for the engines heed
neither"""
    add("--short-side", type=_number(int, 1), metavar="S", help=text)
    add("--quality", type=_number(int, 1, 100), default=92, metavar="Q", help="of those JPEGs (%(default)s)")
    return _shared(parser)


def _check() -> _Parser:
    parser = _parser("check", CHECK, _run_check)
    text = "count images with a shorter side, px (%(default)s)"
    parser.add_argument("--image-size", type=_number(int, 1), default=224, metavar="S", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    return _shared(parser, tolerate=False)


COMMANDS = {"preview": _preview, "pack": _pack, "check": _check}


def _open(given: argparse.Namespace, tolerate: float) -> Dataset:
    return open_dataset(given.data, given.workers, download=given.download, tolerate=tolerate)


def _run_preview(given: argparse.Namespace) -> int:
    policy = Policy(
        given.image_size,
        dialect=given.dialect,
        min_area=given.min_area,
        jitter_strength=given.jitter,
        blur_p=given.blur,
    )
    dataset = _open(given, given.tolerate_unreadable)
    write_preview(dataset, given.out, policy, count=given.count, seed=given.seed, epoch=given.epoch)
    print(f"wrote {shown(given.out)}, {Path(given.out).stat().st_size / 1e6:.1f} MB")
    return 0


def _run_pack(given: argparse.Namespace) -> int:
    settings = Packing(
        seed=given.seed,
        shard_mib=given.shard_mib,
        per_shard=given.per_shard,
        short_side=given.short_side,
        quality=given.quality,
    )
    tolerate = given.tolerate_unreadable
    dataset = _open(given, tolerate)
    source = "" if given.data in KNOWN else given.data
    manifest = pack(dataset, given.folder, settings=settings, source=source, workers=given.workers, tolerate=tolerate)
    images, size = (sum(values) for values in zip(*((s.images, s.bytes) for s in manifest.shards), strict=True))
    print(
        f"packed {images:,} images into {len(manifest.shards):,} shards in {shown(given.folder)}, {size / 1e6:,.1f} MB"
    )
    for faults, what in (
        ([*dataset.skipped, *manifest.lost], "that cannot be read"),
        (dataset.left_out, "that are not of the set"),
    ):
        if faults:
            name, reason = faults[0]
            print(f"left out {len(faults):,} {what}, the first {shown(name)}: {shown(reason)}")
    return 0


def _run_check(given: argparse.Namespace) -> int:
    dataset, folder = _open(given, 1.0), Path(given.data).expanduser()
    packed = folder if given.data not in KNOWN and (folder / MANIFEST).is_file() else None
    report = check(dataset, folder=packed, image_size=given.image_size, workers=given.workers)
    print("\n".join(report.lines()))
    if given.json:
        try:
            replace_text(Path(given.json), json.dumps(report.json(), indent=1) + "\n")
        except OSError as error:
            raise DataError(f"json must be a file that can be written, got {given.json!r}: {error.strerror}") from error
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())

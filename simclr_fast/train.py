"""Pretrain an encoder: `python -m simclr_fast.train`. This file joins the parts; none of them knows it.

JPEGs -> two augmented views -> encoder -> projection head -> NT-Xent over all ranks -> LARS -> checkpoint, report.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from simclr_fast import checkpoint
from simclr_fast.cli import parse
from simclr_fast.command import tell, told
from simclr_fast.config import ConfigError
from simclr_fast.data import (
    LISTED,
    DataError,
    Dataset,
    changes,
    engine_name,
    fingerprint,
    open_dataset,
    write_images,
    write_skipped,
)
from simclr_fast.data.engines.resident import free_memory
from simclr_fast.distributed import Ranks, unreachable
from simclr_fast.environment import device_name, slower_for
from simclr_fast.evaluation.page import evaluations
from simclr_fast.evaluation.results import read_all
from simclr_fast.launch import DIVERGED, USER_ERROR, job, launch, launched, speaks_for_host, world_size
from simclr_fast.models.weights import check_init
from simclr_fast.optim import describe_lr
from simclr_fast.record import Progress, Recorder, RunError, claimed, read_metrics
from simclr_fast.resume import AFRESH, CONFIG, Job, begin, begun, results, suits, take_up
from simclr_fast.run import Run
from simclr_fast.training.chunks import bn_images
from simclr_fast.training.dry_run import hosts_of, plan
from simclr_fast.training.interrupt import EXIT_REQUEUE, MARKER, write_marker
from simclr_fast.training.step import even
from simclr_fast.training.watch import Diverged

MODULE = "simclr_fast.train"
STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """TERM or USR1, whose number it holds, came while no step was made."""


def _raise_stopped(signum: int, _: object) -> None:
    for name in STOPPING:  # the first one counts, and what is done about it is not broken off
        signal.signal(name, lambda *_: None)
    raise Stopped(signum)


def prepare(cfg: Any, world: int, threads: int) -> Dataset:
    """Open the data and check that the settings fit them, before any work."""
    if cfg.batch % world:
        raise ConfigError(
            f"batch must be divisible by the number of processes, got batch={cfg.batch}, processes={world}"
        )
    new = cfg.resume == "never" or not (cfg.folder() / CONFIG).exists()
    if new and cfg.accumulate != "auto":  # a run's own blocks may be others
        even(cfg.batch, world, int(cfg.accumulate), bn_images(cfg, world, int(cfg.accumulate)))
    if new and cfg.init:
        check_init(cfg.init, cfg.arch)
    try:
        engine_name(cfg.loader)
    except ValueError as error:
        raise ConfigError(f"loader: {error}") from error
    dataset = open_dataset(cfg.data, workers=threads, download=cfg.download, tolerate=cfg.tolerate_unreadable)
    labels = dataset.train.labels
    if cfg.online_linear and (labels is None or not (labels >= 0).any()):
        raise ConfigError(f"online_linear needs data with labels (class folders), and {cfg.data} has none")
    images = len(dataset.train)
    if cfg.batch > images:
        raise ConfigError(f"batch must be at most the number of training images, {images}, got batch={cfg.batch}")
    return dataset


def train(cfg: Any, ranks: Ranks, own: list[Path]) -> int:
    """The whole job on one rank; returns the signal that stopped it, or 0.

    Args:
        own: gets the folder once what it holds is the run that is trained.
    """
    dataset = prepare(cfg, ranks.world, ranks.threads)
    found = fingerprint(dataset)
    ranks.agree(found, f"data must be the same on every rank, and {cfg.data} is not")
    folder = cfg.folder()
    name, launcher = job()
    mine = Job(name, frozenset(str(one) for (one,) in ranks.gather([launcher]) if one))
    with ExitStack() as stack:
        ranks.from_main(lambda: stack.enter_context(claimed(folder)))
        listed = folder / LISTED
        before = ranks.from_main(lambda: take_up(cfg, folder, found, lambda: changes(listed, dataset), mine))
        progress = Progress(speak=ranks.main)
        for line in before.lines:
            progress.say(line)
        if before.finished:
            return 0

        def write() -> None:
            if before.new:
                begin(cfg, folder, mine)
            write_skipped(folder / "skipped.tsv", dataset)
            if before.state is None or before.state["data"] != found:
                write_images(listed, dataset)

        if not before.new:
            own.append(folder)
        run = Run(cfg, ranks, dataset, before.state, found)  # which may refuse: until here a run that was there stays
        ranks.from_main(write)
        own.append(folder)
        for line in introduction(run):
            progress.say(line)
        recorder = Recorder(folder if ranks.main else None, run.step)
        try:
            with progress.running(run.step, run.total):
                stopped = run.fit(recorder, progress)
            if stopped:
                ranks.from_main(lambda: _requeue(folder, stopped, run.step))
                return stopped
            run.finish(recorder, evaluations(read_all(folder / "evaluations")))
        finally:
            recorder.close()
        if ranks.main:
            progress.say(results(folder, recorder.records[-1]))
    return 0


def _requeue(folder: Path, stopped: int, step: int) -> None:
    """Leave the marker that asks for the same command again; not where a user stopped it."""
    if stopped != signal.SIGINT:
        try:
            write_marker(folder, step)
        except OSError as error:
            tell(f"cannot write {folder / MARKER}: {error.strerror}")
    tell(f"stopped after step {step:,} with a checkpoint; the same command goes on from it")


def _stop_outside(cfg: Any, own: list[Path], stopped: int) -> int:
    """TERM or USR1 while nothing is trained: the exit status, and if there is a checkpoint to go on from the marker."""
    folder = cfg.folder()
    try:
        goes_on = bool(own) or (cfg.resume != "never" and begun(cfg, folder))
    except RunError:  # of other settings
        goes_on = False
    if not goes_on or not (folder / "checkpoints" / checkpoint.LAST).exists():
        return 128 + stopped
    if os.environ.get("RANK", "0") == "0":
        try:
            _requeue(folder, stopped, checkpoint.read(folder / "checkpoints" / checkpoint.LAST)["step"])
        except (checkpoint.CheckpointError, KeyError) as error:
            tell(f"stopped without {folder / MARKER}: {error}")
            return 128 + stopped
    return EXIT_REQUEUE


def about(data: Dataset) -> str:
    """The data set in a line."""
    classes = f" in {len(data.classes)} classes" if data.classes else ""
    tested = f", {len(data.test):,} test images" if data.test else ""
    return f"{data.name}: {len(data.train):,} training images{classes}{tested}"


def dry_run(cfg: Any, world: int) -> None:
    """Print the plan of a run, and write nothing.

    Raises:
        ConfigError: it does not fit.
        RunError: its folder holds another.
        CheckpointError: none of its checkpoints can be read.
    """
    data, folder = prepare(cfg, world, threads=0), cfg.folder()
    state, records = None, []
    if cfg.resume != "never" and begun(cfg, folder):
        state, records = checkpoint.load(folder / "checkpoints", aside=False)[0], read_metrics(folder)
        finished = bool(records and records[-1].get("finished"))
        suits(cfg, folder, state, fingerprint(data), lambda: changes(folder / LISTED, data), finished)
        if finished:
            print(f"The run in {folder} is finished: the same command shows its results. {AFRESH}")
            return
    visible = torch.cuda.device_count()
    found = plan(
        cfg, about(data), len(data.train), torch.device("cuda" if cfg.gpus != 0 and visible else "cpu"), world=world,
        per_host=hosts_of(world), free=free_memory(), absent=(cfg.gpus or 0) > visible,
        state=state, records=records,
    )  # fmt: skip
    print("\n".join(found.lines()))
    found.refuse()


def introduction(run: Run) -> list[str]:
    """What is about to be trained on what, in a few lines."""
    cfg, data = run.cfg, run.dataset
    lines = [about(data)]
    listed = cfg.folder() / "skipped.tsv"
    for rows, kind in ((data.skipped, "that cannot be read"), (data.left_out, "that are of no part or class")):
        if rows:
            name, reason = rows[0]
            lines.append(f"skipped {len(rows):,} {kind}, the first {name}: {reason}; all in {listed}")
    parameters = sum(p.numel() for p in run.method.parameters())
    lines.append(
        f"{cfg.arch} x {cfg.width:g}, {parameters / 1e6:.2f} M parameters, {cfg.image_size} px, on {device_name()}"
        f" ({run.ranks.world} process{'es' if run.ranks.world > 1 else ''}, {run.precision}); {run.total:,} steps"
    )
    lines.append(
        describe_lr(cfg.base_lr, cfg.batch, cfg.lr_scaling) + f", {run.schedule.warmup_steps:,} steps of warm-up"
    )
    if run.schedule.warmup_steps >= run.total:
        lines.append("all of this run is warm-up: give more --epochs, or fewer --warmup-epochs")
    if cfg.compile != "off":
        lines.append("the network is compiled at the first step, which can take minutes")
    if run.chunks > 1 or run.bn_images < cfg.batch:
        cut = f"{run.chunks} chunks of a batch; " if run.chunks > 1 else ""
        lines.append(f"{cut}BatchNorm takes its statistics over {run.bn_images:,} images")
    notes = (run.init_note, run.online_note, run.input_note, run.probe.note, *slower_for(cfg.loader))
    return lines + [line for line in notes if line]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start the processes that are asked for, and train; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for name in STOPPING:  # while no step is made
        signal.signal(name, _raise_stopped)
    warnings.filterwarnings("ignore", "LARS steps in plain PyTorch")  # the introduction says so
    ranks: list[Ranks] = []
    try:
        return _main(argv, ranks)
    finally:
        for one in ranks:  # after an error is handled, for its traceback holds the group
            one.close()


def _main(argv: list[str], joined: list[Ranks]) -> int:
    """The exit status; what `joined` gets is to be closed."""
    cfg, own = None, list[Path]()
    try:
        cfg = parse(MODULE, argv)
        if cfg.dry_run:
            absent = not launched() and (cfg.gpus or 0) > torch.cuda.device_count()
            if speaks_for_host():
                dry_run(cfg, cfg.gpus or 1 if absent else world_size(cfg.gpus, cfg.ranks))
            return 0
        world = world_size(cfg.gpus, cfg.ranks)
        if world > 1 and not launched():
            prepare(cfg, world, threads=0)
            return launch(MODULE, argv, world, cfg.folder() / "checkpoints" / checkpoint.LAST)
        joined.append(Ranks(use_gpu=cfg.gpus != 0 and torch.cuda.is_available(), timeout=cfg.timeout))
        stopped = train(cfg, joined[0], own)
    except (ConfigError, DataError, RunError, checkpoint.CheckpointError) as error:
        tell(told(error, joined))
        return DIVERGED if isinstance(error, Diverged) else USER_ERROR
    except RuntimeError as error:
        if not (sentence := unreachable(error)):
            raise
        tell(sentence)
        return 1
    except OSError as error:  # a full or a failing disk
        tell(told(error, joined))
        return 1
    except Stopped as error:
        return _stop_outside(cfg, own, error.args[0]) if cfg else 128 + error.args[0]
    except KeyboardInterrupt:
        if speaks_for_host():
            tell("stopped; the same command goes on from the last checkpoint, if there is one")
        return 130
    if stopped:
        return 130 if stopped == signal.SIGINT else EXIT_REQUEUE
    return 0


if __name__ == "__main__":
    sys.exit(main())

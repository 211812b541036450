"""Pretrain an encoder: `python -m simclr_fast.train`. This file joins the parts; none of them knows it.

JPEGs -> two augmented views -> encoder -> projection head -> NT-Xent over all ranks -> LARS -> checkpoint, report.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast import checkpoint, methods, report
from simclr_fast.cli import parse
from simclr_fast.config import ConfigError
from simclr_fast.data import (
    DataError,
    Dataset,
    Policy,
    Settings,
    choose,
    engine_name,
    fingerprint,
    open_dataset,
    train_views,
    write_skipped,
)
from simclr_fast.data.engines.tune import Waits, memory_in_use, prepared
from simclr_fast.distributed import (
    Ranks,
    data_parallel,
    global_batchnorm,
    launch,
    launched,
    speaks_for_host,
    world_size,
)
from simclr_fast.environment import cpu_has_bf16, device_name, slower_for, versions
from simclr_fast.optim import LARS, Schedule, describe_lr, lars_param_groups, scaled_lr, total_steps, warmup_steps
from simclr_fast.probe import Probe
from simclr_fast.record import Progress, Recorder, RunError, claimed
from simclr_fast.resume import results, take_up

MODULE = "simclr_fast.train"
PAPER_WARMUP_EPOCHS = 10.0


class Run:
    """One training run, as one rank sees it: what it is made of, and where it stands."""

    def __init__(self, cfg: Any, ranks: Ranks, dataset: Dataset, state: dict[str, Any] | None) -> None:
        self.cfg, self.ranks, self.dataset = cfg, ranks, dataset
        self.folder, self.images = cfg.folder(), len(dataset.train)
        self.policy = Policy(
            cfg.image_size, dialect=cfg.dialect, min_area=cfg.min_area, jitter_strength=cfg.jitter, blur_p=cfg.blur
        )
        self.input, self.input_engine, self.input_note = self._input()
        self.engine: dict[str, Any] = {"settings": self.input, "device": ranks.device, "engine": cfg.loader}
        fast_bf16 = ranks.device.type == "cuda" or cpu_has_bf16()
        self.precision = ("bf16" if fast_bf16 else "fp32") if cfg.precision == "auto" else cfg.precision
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        on_gpu = ranks.device.type == "cuda" and self.precision == "bf16"
        self._views = torch.bfloat16 if on_gpu else torch.float32  # what the first convolution takes
        self.probe = Probe(dataset, self.policy, ranks.sharded, self.autocast, self.engine)

        self.total = total_steps(self.images, cfg.epochs, cfg.batch)
        warmup_epochs = min(PAPER_WARMUP_EPOCHS, cfg.epochs / 10) if cfg.warmup_epochs is None else cfg.warmup_epochs
        peak = scaled_lr(cfg.base_lr, cfg.batch, cfg.lr_scaling)
        self.schedule = Schedule(peak, warmup_steps(self.images, warmup_epochs, cfg.batch), self.total)

        torch.manual_seed(cfg.seed)
        self.method = methods.load(cfg.method).Method(cfg)
        self.method.to(ranks.device, memory_format=torch.channels_last)
        groups = lars_param_groups(self.method, cfg.weight_decay)
        self.optimizer = LARS(groups, lr=peak, trust_coefficient=cfg.trust_coefficient)
        self.step, self.best, self.advice = 0, -math.inf, ""
        if state:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best, self.untrained = state["step"], state["best"], state["untrained"]
        else:
            self.untrained = self.probe.untrained(self.method.encoder)
        self.model: nn.Module = self.method
        if ranks.group is not None:
            self.method.group = ranks.group
            global_batchnorm(self.method, ranks.device)
            self.model = data_parallel(self.method)

    def _input(self) -> tuple[Settings, str, str]:
        """How images are prepared, which changes none of them; the engine; and a sentence that says both."""
        cfg, ranks, split = self.cfg, self.ranks, self.dataset.train
        try:
            engine, note = choose(cfg.loader, split, ranks.device, ranks.per_host)
        except ValueError as error:
            raise ConfigError(f"loader: {error}") from error
        settings = Settings(ranks.threads, memory_mib=cfg.input_memory, ranks=ranks.per_host)
        if cfg.workers is not None:
            settings = dataclasses.replace(settings, workers=cfg.workers)
        elif ranks.main or not cfg.tune_input:
            data = split, self.policy, cfg.batch // ranks.world, ranks.device, cfg.loader
            settings = prepared(settings, *data, measure=cfg.tune_input)
        if cfg.tune_input:
            workers, hardware = ranks.from_main(lambda: (settings.workers, settings.hardware))
            settings = dataclasses.replace(settings, workers=workers, hardware=hardware)
        kind = "processes" if engine == "torchvision" else "threads"
        return settings, engine, f"{note}; {settings.workers} {kind} a rank"

    @property
    def chance_loss(self) -> float:
        """ln(2N - 1): the loss of embeddings that tell no image from another."""
        return math.log(2 * self.cfg.batch - 1)

    def fit(self, recorder: Recorder, progress: Progress) -> None:
        """Train from where the run stands to its end, with a checkpoint after every epoch.

        The images are a stream that runs on over epoch borders: an epoch ends with the batch that completes it.
        """
        cfg = self.cfg
        ends = {-(-epoch * self.images // cfg.batch): epoch for epoch in range(1, cfg.epochs)}
        ends[self.total] = cfg.epochs
        evaluated = {round(cfg.epochs * k / cfg.evaluations) for k in range(1, cfg.evaluations + 1)}
        log_every = max(1, min(50, self.images // cfg.batch // 4))
        views = iter(
            train_views(
                self.dataset.train, self.policy, batch=cfg.batch, seed=cfg.seed, start_step=self.step,
                steps=self.total - self.step, rank=self.ranks.rank, world=self.ranks.world, dtype=self._views,
                **self.engine,
            )
        )  # fmt: skip
        recent: list[Tensor] = []
        epoch_losses: list[float] = []
        began, waited, waits, told = time.monotonic(), 0.0, Waits(self.input), False
        while self.step < self.total:
            asked = time.monotonic()
            view1, view2, _ = next(views)
            waited += time.monotonic() - asked
            recent.append(self._train_step(torch.cat([view1, view2])))
            epoch = ends.get(self.step)
            if not epoch and self.step % log_every:
                continue
            entry = self._entry(recent, time.monotonic() - began, waited)
            waits.add(waited)
            epoch_losses.append(entry["loss"])
            score = -sum(epoch_losses) / len(epoch_losses)
            if epoch and self.probe.labelled:
                score = -math.inf
                if epoch in evaluated:
                    score = entry["knn_top1"] = self.probe.accuracy(self.method.encoder)
            recorder.write(entry)
            progress.show(self.step, self._line(entry), always=epoch is not None)
            if self.ranks.device.type == "cuda" and not told:
                progress.say(memory_in_use(self.ranks.device))
                told = True
            if epoch:
                self._save(epoch, score)
                epoch_losses = []
            recent, began, waited = [], time.monotonic(), 0.0
            waits.start()
        self.advice = waits.advice(self.input_engine, self.ranks.device)
        if self.advice:
            progress.say(self.advice)

    def _train_step(self, views: Tensor) -> Tensor:
        """One step on this rank's views; [loss, contrastive top-1] of its rows, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        with self.autocast:
            loss, stats = self.model(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return torch.stack([stats["loss"], stats["contrastive_top1"]])

    def _entry(self, recent: list[Tensor], seconds: float, waited: float) -> dict[str, Any]:
        """The record of the last few steps."""
        loss, top1 = self.ranks.mean(torch.stack(recent).mean(0)).tolist()
        lr = self.schedule(self.step - 1)
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} by step {self.step}, at lr {lr:.4g}. Lower --base-lr or raise --temperature; "
                f"{self.folder} keeps the checkpoints of the epochs before, if there were any"
            )
        return {
            "step": self.step,
            "epoch": round(min(self.step * self.cfg.batch / self.images, self.cfg.epochs), 3),
            "loss": loss,
            "contrastive_top1": top1,
            "lr": lr,
            "images_per_s": len(recent) * self.cfg.batch / seconds,
            "data_wait": waited / seconds,
        }

    def _line(self, entry: dict[str, Any]) -> str:
        line = (
            f"epoch {entry['epoch']:.1f}/{self.cfg.epochs} · loss {entry['loss']:.3f} (ln(2N-1) {self.chance_loss:.2f})"
            f" · top-1 {entry['contrastive_top1']:.1%} · lr {entry['lr']:.3g} · {entry['images_per_s']:,.0f} images/s"
            f" · waiting for data {entry['data_wait']:.0%}"
        )
        return line + (f" · kNN {entry['knn_top1']:.1%}" if "knn_top1" in entry else "")

    def _save(self, epoch: int, score: float) -> None:
        better, self.best = score > self.best, max(score, self.best)

        def save() -> None:
            state = {
                "step": self.step, "epoch": epoch, "images": self.images, "config": dataclasses.asdict(self.cfg),
                "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
                "best": self.best, "untrained": self.untrained,
            }  # fmt: skip
            checkpoint.save(self.folder / "checkpoints", state, best=better)

        self.ranks.from_main(save)

    def finish(self, recorder: Recorder) -> None:
        """Write the report and the last record, which says that the run is finished."""
        pictures = self.probe.pictures(self.method.encoder, self.cfg.seed)
        if not self.ranks.main:
            return
        last = recorder.records[-1]
        accuracies = self.untrained | ({"trained encoder": last["knn_top1"]} if "knn_top1" in last else {})
        page = report.Run(
            title=self.folder.name, settings=self.cfg.settings(), versions=versions(), metrics=recorder.records,
            chance_loss=self.chance_loss, knn=accuracies, knn_note=self.probe.note,
            notes=[note for note in (*slower_for(self.cfg.loader), self.advice) if note], **pictures,
        )  # fmt: skip
        report.write_report(self.folder / "report.html", page)
        recorder.write(last | {"knn": accuracies, "finished": True})


def prepare(cfg: Any, world: int, threads: int) -> Dataset:
    """Open the data and check that the settings fit them, before any work."""
    if cfg.batch % world:
        raise ConfigError(
            f"batch must be divisible by the number of processes, got batch={cfg.batch}, processes={world}"
        )
    try:
        engine_name(cfg.loader)
    except ValueError as error:
        raise ConfigError(f"loader: {error}") from error
    dataset = open_dataset(cfg.data, workers=threads, download=cfg.download, tolerate=cfg.tolerate_unreadable)
    images = len(dataset.train)
    if cfg.batch > images:
        raise ConfigError(f"batch must be at most the number of training images, {images}, got batch={cfg.batch}")
    return dataset


def train(cfg: Any, ranks: Ranks) -> None:
    """The whole job on one rank."""
    dataset = prepare(cfg, ranks.world, ranks.threads)
    ranks.agree(fingerprint(dataset), f"data must be the same on every rank, and {cfg.data} is not")
    folder = cfg.folder()
    with ExitStack() as stack:
        ranks.from_main(lambda: stack.enter_context(claimed(folder)))
        state, lines, finished = ranks.from_main(lambda: take_up(cfg, folder, len(dataset.train)))
        progress = Progress(speak=ranks.main)
        ranks.from_main(lambda: write_skipped(folder / "skipped.tsv", dataset))
        for line in lines:
            progress.say(line)
        if finished:
            return
        run = Run(cfg, ranks, dataset, state)
        for line in introduction(run):
            progress.say(line)
        recorder = Recorder(folder if ranks.main else None, run.step)
        try:
            with progress.running(run.step, run.total):
                run.fit(recorder, progress)
            run.finish(recorder)
        finally:
            recorder.close()
        if ranks.main:
            progress.say(results(folder))


def introduction(run: Run) -> list[str]:
    """What is about to be trained on what, in a few lines."""
    cfg, data = run.cfg, run.dataset
    tested = f", {len(data.test):,} test images" if data.test else ""
    lines = [
        f"{data.name}: {run.images:,} training images"
        + (f" in {len(data.classes)} classes" if data.classes else "")
        + tested
    ]
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
    return lines + [line for line in (run.input_note, run.probe.note, *slower_for(cfg.loader)) if line]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start the processes that are asked for, and train; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.filterwarnings("ignore", "LARS steps in plain PyTorch")  # the introduction says so
    try:
        cfg = parse(MODULE, argv)
        world = world_size(cfg.gpus, cfg.ranks)
        if world > 1 and not launched():
            prepare(cfg, world, threads=0)
            return launch(MODULE, argv, world)
        ranks = Ranks(use_gpu=cfg.gpus != 0 and torch.cuda.is_available())
        try:
            train(cfg, ranks)
        finally:
            ranks.close()
    except (ConfigError, DataError, RunError, checkpoint.CheckpointError) as error:
        if speaks_for_host():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full or a failing disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks_for_host():
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

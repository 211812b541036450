"""A run: what it is made of, its loop, its checkpoints and its end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from simclr_fast import checkpoint, report
from simclr_fast.config import ConfigError
from simclr_fast.data import Dataset, Policy, choose, train_views
from simclr_fast.data.engines.choice import preload
from simclr_fast.data.engines.resident import free_memory
from simclr_fast.data.engines.tune import Waits, memory_in_use, settings_for
from simclr_fast.distributed import Ranks
from simclr_fast.environment import slower_for, versions
from simclr_fast.models.weights import load_weights
from simclr_fast.optim import LARS, lars_param_groups
from simclr_fast.probe import Probe
from simclr_fast.record import Progress, Recorder, RunError
from simclr_fast.training.chunks import divide, fitting
from simclr_fast.training.interrupt import Interrupt, Interrupted, write_marker
from simclr_fast.training.online import OnlineLinear
from simclr_fast.training.parts import Parts
from simclr_fast.training.setup import arithmetic, new_method, schedule
from simclr_fast.training.step import METRICS, Step
from simclr_fast.training.watch import Watch, chance_loss, means


class Run:
    """One training run, as one rank sees it: what it is made of, and where it stands."""

    def __init__(self, cfg: Any, ranks: Ranks, dataset: Dataset, state: dict[str, Any] | None, data: str) -> None:
        """`state` is what a checkpoint holds, or None; `data` the fingerprint of the images."""
        self.cfg, self.ranks, self.dataset, self.data = cfg, ranks, dataset, data
        self.folder, self.images = cfg.folder(), len(dataset.train)
        self.policy = Policy(
            cfg.image_size, dialect=cfg.dialect, min_area=cfg.min_area, jitter_strength=cfg.jitter, blur_p=cfg.blur
        )
        try:
            self.input, self.input_note = settings_for(
                dataset.train, self.policy, ranks.device, engine=cfg.loader, batch=cfg.batch // ranks.world,
                threads=ranks.threads, ranks=ranks.per_host, memory_mib=cfg.input_memory, workers=cfg.workers,
                measure=cfg.tune_input, shared=ranks.from_main,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"loader: {error}") from error
        self.engine: dict[str, Any] = {"settings": self.input, "device": ranks.device, "engine": cfg.loader}
        self.precision, self.autocast, self._views = arithmetic(cfg.precision, ranks.device)
        self.probe = Probe(dataset, self.policy, ranks.sharded, self.autocast, self.engine)
        for split in (dataset.train, dataset.test if self.probe.labelled else None):
            if split is not None:  # now: it can take long, and is no stall of a reader
                preload(cfg.loader, split, ranks.device, self.input)

        self.schedule = schedule(cfg, self.images)
        self.total = self.schedule.total_steps
        self.method = new_method(cfg, ranks.device)
        self.init_note = self._start_weights() if cfg.init and not state else ""
        groups = lars_param_groups(self.method, cfg.weight_decay)
        self.optimizer = LARS(groups, lr=self.schedule.peak, trust_coefficient=cfg.trust_coefficient)
        self.watch = Watch(cfg.batch, cfg.temperature, self.schedule, ranks.gather)
        self.step, self.best, self.advice, self.warnings = 0, -math.inf, "", list[str]()
        self._interval: list[Tensor] = []  # metrics of the steps since the last record
        self._losses: list[float] = []  # of the records since the last epoch
        self.pending: dict[str, Any] | None = None  # the record of this step, while its evaluation is to be made
        self._kept = True  # whether the last checkpoint that was to be written is there
        if state:
            self._take_up(state)
        else:
            self.untrained = self.probe.untrained(self.method.encoder, given=bool(cfg.init))
        saved = state["bn_images"] if state else None
        self.chunks, self.bn_images = divide(cfg, ranks.world, saved, self._fits, ranks.most)
        self.update = Step(
            self.method, self.optimizer, self.schedule, batch=cfg.batch, group=ranks.group, autocast=self.autocast,
            accumulate=self.chunks, bn_images=self.bn_images, seed=cfg.seed, compiled=cfg.compile,
            timeout=cfg.timeout,
        )  # fmt: skip
        self.online_note = ""
        self.online = self._classifier(state) if cfg.online_linear else None

    def _classifier(self, state: dict[str, Any] | None) -> OnlineLinear:
        """That of --online-linear."""
        encoder = self.method.encoder
        found = OnlineLinear(
            encoder, encoder.num_features, len(self.dataset.classes), pieces=self.update.pieces, group=self.ranks.group
        )
        before = state and state.get("classes", self.dataset.classes if state["data"] == self.data else None)
        if state and before is not None and [*before] == [*self.dataset.classes]:
            found.load_state_dict(state["online"])
        elif state:
            self.online_note = "the classes are others than before: --online-linear begins anew"
        return found

    def _start_weights(self) -> str:
        """Load --init's, the main rank first: it may have to fetch them."""
        arguments = self.method.encoder, self.cfg.init, self.cfg.arch
        said = self.ranks.from_main(lambda: load_weights(*arguments))
        return said if self.ranks.main else load_weights(*arguments)

    def _take_up(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.untrained = state["step"], state["best"], state["untrained"]
        self._interval = list(self._own(state["interval"]).to(self.ranks.device))
        self._losses, self.pending = state["losses"], state.get("pending")
        self.watch.load_state_dict(state["watch"])
        self.warnings = state["warnings"]
        if self.step > self.total:
            raise RunError(
                f"{self.folder} has made {self.step:,} steps already, and {self.images:,} images make {self.total:,}. "
                "Put back those that are gone, or choose another --out"
            )

    def _rows(self) -> Tensor:
        """All ranks' metrics of the steps since the last record, [ranks, k, 4]."""
        own = torch.stack(self._interval).flatten().tolist() if self._interval else []
        every = torch.tensor(self.ranks.gather(own))
        return every.view(len(every), len(self._interval), len(METRICS))

    def _own(self, rows: Tensor) -> Tensor:
        """This rank's of them, [k, 4]: as they were, or where the ranks are others their means (once only these were
        saved)."""
        if rows.dim() < 3:
            return rows
        return rows[self.ranks.rank] if len(rows) == self.ranks.world else rows.mean(0)

    @property
    def _fits(self) -> Any:
        """Whether a step fits in so many chunks, for --accumulate auto."""
        device = self.ranks.device
        return fitting(
            self.method, self.cfg.batch // self.ranks.world, self.cfg.image_size, device, autocast=self.autocast,
            half=self.precision == "bf16", dtype=self._views, world=self.ranks.world,
            free=free_memory() // self.ranks.per_host,
        )  # fmt: skip

    def fit(self, recorder: Recorder, progress: Progress) -> int:
        """Train from where the run stands to its end, or to a signal: returns the signal, or 0.

        The images are a stream that runs on over epoch borders: an epoch ends with the batch that completes it.
        """
        cfg, ranks = self.cfg, self.ranks
        ends = {-(-epoch * self.images // cfg.batch): epoch for epoch in range(1, cfg.epochs)}
        ends[self.total] = cfg.epochs
        evaluated = cfg.evaluated() if self.probe.labelled else set()
        log_every = max(1, min(50, self.images // cfg.batch // 4))
        saver = checkpoint.Checkpoints(self.folder / "checkpoints")
        with Interrupt(ranks.group, ranks.device) as interrupt:
            if self.pending and (stop := self._evaluate(saver, interrupt, recorder, progress)):
                return stop
            parts, waits = Parts(self._parts(), cfg.timeout), Waits(self.input)
            told, saved, first = False, time.monotonic(), self.step
            while self.step < self.total:
                self._interval.append(self.update(self.step, parts.take(self.chunks)))
                if self.online:
                    self.online.update()
                self.step += 1
                epoch = ends.get(self.step)
                due = ranks.main and (saver.due() or time.monotonic() - saved > 60 * cfg.checkpoint_minutes)
                stop, due = interrupt.wanted(due)
                logged, score = epoch or self.step % log_every == 0, -math.inf
                if logged:
                    entry = self._entry(self.step - first, parts)
                    waits.add(parts.waited)
                    if epoch:
                        score = self._score()
                    if epoch in evaluated:
                        self.pending = entry
                    else:
                        self._record(entry, recorder, progress, always=epoch is not None)
                if epoch or due or stop:
                    progress.say(self._save(saver, score, final=bool(stop) or self.step == self.total))
                    saved = time.monotonic()
                if self.pending and not stop:
                    stop = self._evaluate(saver, interrupt, recorder, progress)
                if stop and (self.pending or self.step < self.total):
                    return stop
                if logged:
                    if ranks.device.type == "cuda" and not told:
                        progress.say(memory_in_use(ranks.device))
                        told = True
                    first = self.step
                    parts.start()
                    waits.start()
        engine = choose(cfg.loader, self.dataset.train, ranks.device, ranks.per_host)[0]
        self.advice = waits.advice(engine, ranks.device)
        progress.say(self.advice)
        return 0

    def _parts(self) -> Iterator[Tensor]:
        """The views of each chunk of each step from here on, [2m, 3, S, S]."""
        views = train_views(
            self.dataset.train, self.policy, batch=self.cfg.batch, seed=self.cfg.seed, start_step=self.step,
            steps=self.total - self.step, parts=self.chunks, rank=self.ranks.rank, world=self.ranks.world,
            dtype=self._views, **self.engine,
        )  # fmt: skip
        labels = self.dataset.train.labels
        for view1, view2, indices in views:
            if self.online and labels is not None:
                self.online.expect(torch.from_numpy(labels[indices]))
            yield torch.cat([view1, view2])

    def _entry(self, steps: int, parts: Parts) -> dict[str, Any]:
        """The record of the interval's steps, the last `steps` of which were taken since `parts` was started."""
        rows = torch.stack(self._interval)
        loss, top1, spread = self.ranks.mean(means(rows)).tolist()
        seconds = parts.seconds()
        self._losses.append(loss)
        online = {"online_top1": self.online.accuracy()} if self.online else {}
        return {
            "step": self.step,
            "epoch": round(min(self.step * self.cfg.batch / self.images, self.cfg.epochs), 3),
            "loss": loss,
            "contrastive_top1": top1,
            "embedding_spread": spread,
            "lr": self.schedule(self.step - 1),
            "images_per_s": steps * self.cfg.batch / seconds,
            "data_wait": parts.waited / seconds,
            **online,
        }

    def _record(self, entry: dict[str, Any], recorder: Recorder, progress: Progress, *, always: bool) -> None:
        """End the interval with its record."""
        recorder.write(entry)
        progress.show(self.step, self._line(entry), always=always)
        for warning in self._look():
            progress.say(warning)

    def _evaluate(
        self, saver: checkpoint.Checkpoints, interrupt: Interrupt, recorder: Recorder, progress: Progress
    ) -> int:
        """Make the evaluation that is pending, and end the interval; or return the signal that has stopped it.

        The checkpoint of before says that it is pending. So it is made again after a stop, but for one that came when
        its record was there already.
        """
        assert self.pending is not None
        ranks, entry = self.ranks, self.pending
        made = ranks.from_main(lambda: next((one for one in recorder.records[-1:] if one["step"] == self.step), None))
        if made is None and self.probe.labelled:
            try:
                with interrupt.evaluating(self._requeue if self._kept else None):
                    entry = entry | {"knn_top1": self.probe.accuracy(self.method.encoder, interrupt)}
            except Interrupted as stopped:
                if not self._kept:
                    progress.say(self._save(saver, -math.inf, final=True))
                return stopped.signum
        score = (made or entry).get("knn_top1", -math.inf)
        if score > self.best:  # before its record, which says that this is done
            kept, said = ranks.from_main(saver.keep_best)
            self.best = score if kept else self.best
            progress.say(said)
        self.pending = None
        if made is None:
            self._record(entry, recorder, progress, always=True)
        else:
            self._look()
        return 0

    def _requeue(self) -> None:
        if self.ranks.main:
            write_marker(self.folder, self.step)

    def _look(self) -> list[str]:
        """Warnings about the steps of the interval, which ends here."""
        rows, self._interval = torch.stack(self._interval).cpu(), []
        found = self.watch.look(self.step - len(rows), rows)
        self.warnings += found
        return found

    def _score(self) -> float:
        """How good the run is after an epoch, by its loss; -inf if unknown, or where evaluations are to say it."""
        known, self._losses = [loss for loss in self._losses if math.isfinite(loss)], []
        return -sum(known) / len(known) if known and not self.probe.labelled else -math.inf

    def _line(self, entry: dict[str, Any]) -> str:
        line = (
            f"epoch {entry['epoch']:.1f}/{self.cfg.epochs} · loss {entry['loss']:.3f}"
            f" (ln(2N-1) {chance_loss(self.cfg.batch):.2f}) · top-1 {entry['contrastive_top1']:.1%}"
            f" · lr {entry['lr']:.3g} · {entry['images_per_s']:,.0f} images/s"
            f" · waiting for data {entry['data_wait']:.0%}"
        )
        line += f" · linear {entry['online_top1']:.1%}" if "online_top1" in entry else ""
        return line + (f" · kNN {entry['knn_top1']:.1%}" if "knn_top1" in entry else "")

    def _save(self, saver: checkpoint.Checkpoints, score: float, final: bool) -> str:
        """Write a checkpoint; what there is to say of it."""
        rows, best = self._rows(), max(score, self.best)

        def save() -> tuple[str, bool]:
            state = {
                "step": self.step, "images": self.images, "data": self.data,
                "config": dataclasses.asdict(self.cfg), "bn_images": self.bn_images,
                "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
                "interval": rows, "pending": self.pending, "losses": self._losses, "watch": self.watch.state_dict(),
                "warnings": self.warnings,
                "best": best, "untrained": self.untrained,
                "online": self.online.state_dict() if self.online else None, "classes": [*self.dataset.classes],
            }  # fmt: skip
            said = saver.save(state, best=score > self.best, final=final)
            return said, saver.failures == 0

        said, self._kept = self.ranks.from_main(save)
        self.best = best if self._kept else self.best
        return said

    def finish(self, recorder: Recorder, evaluation: str = "") -> None:
        """Write the report, with HTML of evaluations, and the last record, which says that the run is finished."""
        pictures = self.probe.pictures(self.method.encoder, self.cfg.seed)
        if not self.ranks.main:
            return
        last = recorder.records[-1] if recorder.records else {"step": self.step}
        accuracies = self.untrained | ({"trained encoder": last["knn_top1"]} if "knn_top1" in last else {})
        page = report.Run(
            title=self.folder.name, settings=self.cfg.settings(), versions=versions(), metrics=recorder.records,
            chance_loss=chance_loss(self.cfg.batch), knn=accuracies, knn_note=self.probe.note, evaluation=evaluation,
            notes=[note for note in (*slower_for(self.cfg.loader), *self.warnings, self.advice) if note], **pictures,
        )  # fmt: skip
        report.write_report(self.folder / "report.html", page)
        recorder.write(last | {"knn": accuracies, "skipped_steps": self.watch.skipped, "finished": True})

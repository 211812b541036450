"""What a run will be, before it starts: `--dry-run`. Numbers are computed from the settings, counted or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simclr_fast.config import ConfigError
from simclr_fast.optim import Schedule, describe_lr
from simclr_fast.training.costs import Network, Speed, Traffic, benched, loss_flop, step_flop, traffic
from simclr_fast.training.memory import Memory

NVLINK, NETWORK = 450.0, 50.0  # GB/s a GPU sends: NVLink of an H100 or H200; 400 Gbit/s InfiniBand for each GPU


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The facts of a run, from which `lines` makes a page."""

    cfg: Any
    network: Network
    data: str
    """A line about the images; `images` are those that are trained on."""

    images: int
    schedule: Schedule
    device: str
    on_gpu: bool
    precision: str
    memory: Memory
    """Of a step on one device; `room` is what it may take, bytes, None where the device is not here."""

    room: int | None
    bn_images: int
    """Images that share BatchNorm's statistics, and the ranks that these are on."""

    norm_ranks: int = 1
    world: int = 1
    hosts: int = 1
    chunks: int = 1
    step: int = 0
    """Where the run takes up."""

    speed: Speed | None = None
    link: float | None = None
    """GB/s that a rank sends; None is what is usual for GPUs."""

    flags: int = 1
    """Messages of a few numbers in a step."""

    @property
    def traffic(self) -> list[Traffic]:
        """What each rank sends in a step."""
        return traffic(
            world=self.world,
            gradients=self.network.gradients,
            batch=self.cfg.batch,
            features=self.network.features,
            channels=self.network.channels,
            chunks=self.chunks,
            norm_ranks=self.norm_ranks,
            feature_bytes=2 if self.on_gpu else 4,
            flags=self.flags,
        )

    @property
    def rate(self) -> float | None:
        """`link`, or the usual one; None on CPUs."""
        return self.link or ((NVLINK if self.hosts == 1 else NETWORK) if self.on_gpu else None)

    @property
    def own(self) -> int:
        """Images of a rank in a step."""
        return self.cfg.batch // self.world

    @property
    def sending_s(self) -> float | None:
        """Seconds that a step's bytes take on the link, latency left out."""
        return sum(part.sent for part in self.traffic) / (self.rate * 1e9) if self.rate else None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, none of the communication hidden."""
        if self.speed is None:
            return None
        if self.speed.whole:
            return self.cfg.batch / self.speed.images_per_s
        twice = step_flop(self.network, self.chunks) / self.network.flop
        return self.own / self.speed.images_per_s * twice + (self.sending_s or 0)

    def refuse(self) -> None:
        """
        Raises:
            ConfigError: a step does not fit; it names what to change.
        """
        if self.room is None or self.memory.total <= self.room:
            return
        short = f"a step takes {_gib(self.memory.total)} for each {self._unit}, of {_gib(self.room)} that can be used"
        if self.memory.indivisible > self.room:
            raise ConfigError(
                f"batch: {short}; the views, embeddings and weights alone take {_gib(self.memory.indivisible)}, which "
                f"--accumulate cannot help: give a smaller --batch or more processes, got batch={self.cfg.batch}"
            )
        raise ConfigError(
            f"accumulate: {short}; give --accumulate auto, which finds chunks that fit, or a smaller --batch, got "
            f"accumulate={self.chunks}, batch={self.cfg.batch}"
        )

    def lines(self) -> list[str]:
        """The page, in two columns."""
        parts = [self._what(), self._memory(), self._communication(), self._time()]
        width = max(len(name) for part in parts for name, _ in part)
        pages = ["\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in part) for part in parts]
        return "\n\n".join(pages).split("\n")

    @property
    def _unit(self) -> str:
        return "GPU" if self.on_gpu else "process"

    def _count(self, ranks: int) -> str:
        plural = "" if ranks == 1 else "s" if self.on_gpu else "es"
        return f"{ranks:,} {self._unit}{plural}"

    def _what(self) -> list[tuple[str, str]]:
        cfg, batch, own = self.cfg, self.cfg.batch, self.own
        every = step_flop(self.network, self.chunks)
        loss = loss_flop(batch, self.network.features) / (batch * every)
        encoder, head = self.network.encoder / 1e6, self.network.head / 1e6
        chunks = f"in {self.chunks:,} chunks of {own // self.chunks:,}" if self.chunks > 1 else "at once"
        begun = f"; from step {self.step:,} on" if self.step else ""
        return [
            ("images", self.data),
            ("network", f"{cfg.arch} x {cfg.width:g}, {encoder:.2f} M parameters, and a head of {head:.2f} M"),
            ("device", f"{self.device}; {self._count(self.world)}, {self.precision}"),
            (
                "arithmetic",
                f"{every / 1e9:,.3g} GFLOP for an image of {cfg.image_size} px, both views; loss +{loss:.2%}",
            ),
            ("learning rate", describe_lr(cfg.base_lr, batch, cfg.lr_scaling)),
            ("schedule", f"{self.schedule.warmup_steps:,} steps of warm-up, then a cosine down to 0{begun}"),
            ("steps", f"{self.schedule.total_steps:,} = {self.images:,} x {cfg.epochs:,} epochs / {batch:,} + 1"),
            ("a step", f"{batch:,} images, {2 * batch:,} views; for each {self._unit} {own:,} images, {chunks}"),
            ("BatchNorm", f"over {self.bn_images:,} images, {self._count(self.norm_ranks)}"),
        ]

    def _memory(self) -> list[tuple[str, str]]:
        held = self.memory
        sizes = {
            "weights, gradients, velocity": held.model,
            "activations of a chunk" if self.chunks > 1 else "activations": held.activations,
            "views": held.views,
            "loss": held.loss,
            "workspace and all else" if held.measured else "workspace": held.workspace,
        }
        how = "measured on one step" if held.measured else "estimated"
        room = "" if self.room is None else f" of {_gib(self.room)} that can be used"
        return [
            (f"memory for each {self._unit}", how),
            *((f"  {name}", f"{_gib(size):>12}") for name, size in sizes.items()),
            ("  sum", f"{_gib(held.total):>12}{room}"),
        ]

    def _communication(self) -> list[tuple[str, str]]:
        if not self.traffic:
            return [("communication", f"none: one {self._unit}")]
        messages, sent = sum(part.messages for part in self.traffic), sum(part.sent for part in self.traffic)
        speed = f", at {self.rate:g} GB/s" if self.rate else "; --link GB/s gives its time"
        share = ""
        if self.step_s and self.sending_s:
            share = f", {self.sending_s / self.step_s:.1%} of a step if nothing hides it"
        return [
            ("communication in a step", f"what each {self._unit} sends{speed}"),
            *((f"  {name}", self._sent(count, size)) for name, count, size in self.traffic),
            ("  sum", self._sent(messages, sent) + share),
            ("  latency", f"each 10 us of a message's latency add {messages / 100:.2f} ms"),
        ]

    def _sent(self, messages: int, size: int) -> str:
        took = f"{size / self.rate / 1e6:10.3f} ms" if self.rate else ""
        return f"{_bytes(size):>10}{took} in {messages:,} message{'' if messages == 1 else 's'}"

    def _time(self) -> list[tuple[str, str]]:
        cfg = self.cfg
        if self.speed is None or self.step_s is None:
            how = "begin the run: once it has records, --dry-run knows its speed"
            if benched(cfg.arch, cfg.width):
                how = f"python bench/step_bench.py --arch {cfg.arch} --image-size {cfg.image_size}"
            return [("time", "not known: no such step was measured on this device"), ("  to measure it", how)]
        left = self.schedule.total_steps - self.step
        of = "all in all" if self.speed.whole else f"for each {self._unit}, without waiting for images"
        return [
            ("speed", f"{self.speed.images_per_s:,.0f} images/s {of} ({self.speed.source})"),
            ("time", f"{clock(left * self.step_s)} for {left:,} steps of {self.step_s:.3g} s"),
        ]


def clock(seconds: float) -> str:
    """A time in its two largest units: "3 d 4 h", "2 h 5 min", "40 s"."""
    for unit, part, size, small in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        count = round(seconds / small)
        if count >= size // small:
            return f"{count * small // size} {unit} {count % (size // small)} {part}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"

"""Features of the images of a data set by one encoder: over all ranks, with progress, and kept on the disk.

A file of the cache is named by all that its numbers depend on: the encoder's weights, the images, how they are
prepared and the precision. It is written under another name first, so that a reader finds all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from simclr_fast.config import ConfigError
from simclr_fast.data import DataError, Policy, Settings, Split, choose, eval_images
from simclr_fast.data.sources.samples import Ticker, cache_folder
from simclr_fast.distributed import Ranks
from simclr_fast.pretrained import Encoder
from simclr_fast.training.setup import arithmetic

FORMAT = 2  # of the files; another number makes all of them anew
CACHE_GIB = 20.0  # files beyond that are removed, those unused for longest first
UNFINISHED_S = 86_400.0  # after which a file that was never finished is removed

_digests: WeakKeyDictionary[Split, str] = WeakKeyDictionary()

Transform = Callable[[Tensor, np.ndarray], Tensor]
"""Prepared images [B, 3, S, S] and their indices [B] to other images of that shape."""


class Extractor:
    """Features h of one encoder."""

    def __init__(
        self,
        encoder: Encoder,
        ranks: Ranks,
        *,
        batch: int = 256,
        precision: str = "auto",
        workers: int | None = None,
        cache: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            encoder: as `load` gives it; it is moved to the rank's device.
            batch: images in one pass, on each rank.
            precision: fp32, bf16 or auto, as for training; features are float32 all the same.
            workers: threads that prepare images; None is one for each core.
            cache: keep what is computed in the cache folder, and look there first.
            say: where sentences go.
        """
        self.ranks, self.batch, self.say = ranks, batch, say
        self.encoder = encoder.to(ranks.device).to(memory_format=torch.channels_last)
        self.precision, self.autocast, self._dtype = arithmetic(precision, ranks.device)
        self.settings = Settings(ranks.threads if workers is None else workers, ranks=ranks.per_host)
        self._digest = encoder.digest() if cache else ""
        self._folder = cache_folder() / "features" if cache else None

    def features(
        self,
        split: Split,
        indices: np.ndarray | None = None,
        *,
        name: str = "images",
        transform: Transform | None = None,
        policy: Policy | None = None,
    ) -> Tensor:
        """h of the central crops, [n, num_features] float32 on the CPU, on every rank.

        Args:
            indices: int64 [n], of the images; None is all of them in order.
            name: what the images are called while this goes on.
            transform: changes the images before they are encoded; it has a `key`, a string that says what it does.
            policy: whose central crops; None is the encoder's own.
        Raises:
            DataError: an image became unreadable; on every rank.
            ConfigError: a feature is not finite; on every rank.
        """
        chosen = np.arange(len(split)) if indices is None else np.asarray(indices, np.int64)
        if not len(chosen):
            return torch.empty(0, self.encoder.num_features)
        policy = policy or self.encoder.policy
        path = self._path(split, chosen, getattr(transform, "key", ""), policy)
        kept = self.ranks.from_main(lambda: path is not None and path.exists())
        if kept and path is not None and (found := self._read(path, len(chosen))) is not None:
            self.say(f"features of {len(chosen):,} {name} are in the cache ({self.precision})")
            return found
        lost: list[str] = []
        rows = self.ranks.sharded(
            len(chosen), lambda part: self._encode(split, chosen[part], name, transform, policy, lost)
        )
        found = rows.cpu()
        if self.ranks.most(len(lost)):
            raise DataError(
                f"data must stay readable while they are used, and {lost[0] if lost else 'an image'} did not"
            )
        bad = int((~found.isfinite().all(1)).sum())
        if bad:
            raise ConfigError(
                f"checkpoint must give finite features, got NaN or infinity for {bad:,} of {len(found):,} {name}: "
                f"{self.encoder.origin} may have diverged"
            )
        if path is not None and self.ranks.main:
            self._write(path, found.numpy())
        return found

    @torch.no_grad()
    def _encode(
        self, split: Split, indices: np.ndarray, name: str, transform: Transform | None, policy: Policy, lost: list[str]
    ) -> Tensor:
        """Of this rank's share, on its device; `lost` gets the names of images that others took the place of."""
        total, done, waited, began = len(indices), 0, 0.0, time.monotonic()
        everywhere = f" on each of {self.ranks.world} ranks" if self.ranks.world > 1 else ""
        out = torch.empty(total, self.encoder.num_features, device=self.ranks.device)
        ticker = Ticker()
        batches = eval_images(
            split, policy, batch=self.batch, device=self.ranks.device, indices=indices,
            dtype=torch.float32 if transform else self._dtype, settings=self.settings,
        )  # fmt: skip
        try:
            while True:
                asked = time.monotonic()
                item = next(batches, None)
                waited += time.monotonic() - asked
                if item is None:
                    break
                images, rows = item
                planned = indices[done : done + len(images)]
                lost += [split.names[index] for index in planned[planned != rows]]
                if transform is not None:
                    images = transform(images, rows)
                with self.autocast:
                    out[done : done + len(images)] = self.encoder(images).float()
                done += len(images)
                if self.ranks.main and ticker.due():
                    rate = done / (time.monotonic() - began)
                    left = (total - done) / rate
                    ticker.show(
                        f"{name}: {done:,} of {total:,}{everywhere}, {rate * self.ranks.world:,.0f} images/s, waiting "
                        f"for data {waited / (time.monotonic() - began):.0%}, {left:.0f} s left"
                    )
        finally:
            ticker.close()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        taken = time.monotonic() - began
        self.say(
            f"features of {total:,} {name}{everywhere}: {total * self.ranks.world / taken:,.0f} images/s, "
            f"{waited / taken:.0%} of the time waiting for data ({self.precision})"
        )
        return out

    def _path(self, split: Split, indices: np.ndarray, transform: str, policy: Policy) -> Path | None:
        if self._folder is None:
            return None
        known = [FORMAT, self._digest, images_digest(split, indices), policy.size, policy.dialect, self.precision]
        decoder = "dali" if choose("auto", split, self.ranks.device, self.ranks.per_host)[0] == "dali" else "pillow"
        known += [policy.test_crop, self.ranks.device.type, asdict(self.encoder.recipe), transform, decoder]
        name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
        return self._folder / f"{name}.npy"

    def _read(self, path: Path, count: int) -> Tensor | None:
        """What the cache holds; None, on every rank, where one of them cannot read it."""
        rows: np.ndarray | None = None
        with suppress(OSError, ValueError, EOFError):  # gone, or damaged: it is made again
            rows = np.load(path, mmap_mode="c", allow_pickle=False)  # the ranks of a host share its pages
            if rows.shape != (count, self.encoder.num_features) or rows.dtype != np.float32:
                rows = None
        if self.ranks.most(int(rows is None)) or rows is None:
            return None
        with suppress(OSError):
            os.utime(path)
        return torch.from_numpy(rows)

    def _write(self, path: Path, rows: np.ndarray) -> None:
        partial = path.with_name(f".{path.name}.{token_hex(4)}")  # containers that share a folder may share process ids
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.save(file, rows, allow_pickle=False)
            os.replace(partial, path)
            _prune(path.parent, keep=path)
        except OSError as error:
            self.say(f"features are not kept: {error}")
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def images_digest(split: Split, indices: np.ndarray) -> str:
    """Of what the images are: their names, sizes and times of change, or their pixels. Labels do not count."""
    if split not in _digests:
        found = hashlib.sha256()
        if split.pixels is not None:
            found.update(np.ascontiguousarray(split.pixels).data)
        else:
            found.update("\n".join([*split.paths, *split.names]).encode("utf-8", "surrogatepass"))
            for column in (split.offsets, split.lengths, split.sizes, split.stamps):
                found.update(b"" if column is None else np.ascontiguousarray(column).data)
        _digests[split] = found.hexdigest()
    return hashlib.sha256(_digests[split].encode() + np.ascontiguousarray(indices).tobytes()).hexdigest()[:32]


def _prune(folder: Path, keep: Path) -> None:
    """Remove what has not been used for longest, down to the bound, and what was never finished."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it too
            stat = path.stat()
            if path.name.startswith("."):
                if time.time() - stat.st_mtime > UNFINISHED_S:
                    path.unlink()
            elif path != keep:
                files.append((stat.st_mtime, stat.st_size, path))
    room = CACHE_GIB * 2**30 - keep.stat().st_size
    for _, size, path in sorted(files, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink()


def embeddings(encoder: Encoder, h: Tensor) -> Tensor:
    """g(h): the projection head's output [n, d] for features [n, num_features], float32, on the CPU."""
    device: Any = next(encoder.parameters()).device
    with torch.no_grad():
        return torch.cat([encoder.head(rows.to(device)).float().cpu() for rows in h.split(8192)])

"""What a run's metrics say about its health: skipped steps, a loss that stays at chance, embeddings all alike.

With N images, ln(2N - 1) is the loss of embeddings that tell no image from another. None can have less than

    ln(1 + (2N - 2) exp(-N / ((N - 1) tau)))

since the 2N unit rows have mean cosine -1/(N - 1) at best where they are not pairs, and exp is convex. At a large tau
that floor lies close to chance, so that "near chance" is measured as a share of the way down to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_fast.optim import Schedule
from simclr_fast.record import RunError

LOSS, TOP1, SPREAD, SKIPPED = range(4)  # of a row: what a step measures, as `Step` returns it
SKIPPED_IN_A_ROW = 5  # a bad batch spoils one step; five batches in a row are not all bad, the weights are
INTERVALS = 5  # that a state lasts before it is said: single ones are noise
STUCK_LOSS = 0.01  # of the way from chance to the floor; training that works is past it within the warm-up
STUCK_TOP1 = 2  # times chance, 1/N; an encoder that sees anything finds more pairs, long before the loss moves
COLLAPSED = 0.01  # spread: two images then have a mean cosine of 0.99
AGAIN = 0.25  # of the run passes before a stuck loss is said once more

VIEWS = "look at the views (`python -m simclr_fast.data preview DATA page.html`)"


class Diverged(RunError):
    """A run whose steps change nothing any more; the text says since when, and what to try."""


def chance_loss(batch: int) -> float:
    """Loss in nats of embeddings that are all alike, for a global batch of `batch` images."""
    return math.log(2 * batch - 1)


def floor_loss(batch: int, temperature: float) -> float:
    """Loss in nats that even perfect embeddings of `batch` >= 2 images have at least."""
    return math.log1p((2 * batch - 2) * math.exp(-batch / ((batch - 1) * temperature)))


def means(rows: Tensor) -> Tensor:
    """Loss, top-1 and spread, float64 [3], over the steps [k, 4] that were not skipped; NaN if all were."""
    taken = rows[rows[:, SKIPPED] == 0, :SKIPPED].double()
    return taken.mean(0) if len(taken) else taken.new_full((SKIPPED,), math.nan)


@dataclass
class Seen:
    """What a watch remembers; it goes into the checkpoint. A step of -1 stands for none."""

    skipped: int = 0
    in_a_row: int = 0
    finite_loss: float = 0.0
    finite_step: int = -1
    stuck_for: int = 0
    stuck_said: int = -1
    collapsed_for: int = 0
    collapsed_said: int = -1


class Watch:
    """Looks at the metrics of every step, an interval at a time.

    Args:
        batch: images of the global batch, N.
        temperature: tau.
        schedule: tells the learning rate, the warm-up, during which nothing is called stuck, and the run's length.
        gather: this rank's numbers -> a list of them for each rank. Called by all ranks or by none.
    """

    def __init__(
        self, batch: int, temperature: float, schedule: Schedule, gather: Callable[[list[float]], list[list[float]]]
    ) -> None:
        self.batch, self.temperature, self.schedule, self.gather = batch, temperature, schedule, gather
        self.chance, self.floor = chance_loss(batch), floor_loss(batch, temperature)
        self._seen = Seen()

    @property
    def skipped(self) -> int:
        """Steps skipped so far."""
        return self._seen.skipped

    def state_dict(self) -> dict[str, int | float]:
        """What has to outlive a restart, as plain numbers."""
        return dataclasses.asdict(self._seen)

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Go on from what `state_dict` gave."""
        self._seen = Seen(**state)  # type: ignore[arg-type]

    def look(self, first_step: int, rows: Tensor) -> list[str]:
        """Take in the steps `first_step`, `first_step` + 1, ...

        Args:
            rows: [k, 4] on the CPU, k >= 1: this rank's loss, contrastive top-1, embedding spread, and 1 where the step
                was skipped, which is equal on all ranks.
        Returns:
            Warnings for the user.
        Raises:
            Diverged: five steps in a row were skipped; on every rank.
        """
        last = first_step + len(rows) - 1
        warnings = self._skips(first_step, rows)
        if first_step >= self.schedule.warmup_steps:
            warnings += self._learning(last, *means(rows).tolist())
        return warnings

    def _skips(self, first_step: int, rows: Tensor) -> list[str]:
        causes = self._causes(first_step, rows)
        seen, began = self._seen, []
        for step, row in enumerate(rows.tolist(), first_step):
            if step not in causes:
                seen.in_a_row, seen.finite_loss, seen.finite_step = 0, row[LOSS], step
                continue
            seen.skipped += 1
            seen.in_a_row += 1
            if seen.in_a_row == 1:
                began.append(step)
            if seen.in_a_row == SKIPPED_IN_A_ROW:
                raise Diverged(self._stop(step, causes[step]))
        if not began:
            return []
        until = f" up to step {max(causes)}" if max(causes) > began[0] else ""
        return [
            f"step {began[0]}: {causes[began[0]]}; the step was skipped and changed nothing"
            f" (skipped so far{until}: {seen.skipped})"
        ]

    def _causes(self, first_step: int, rows: Tensor) -> dict[int, str]:
        """Why, for each step that was skipped."""
        places = (rows[:, SKIPPED] != 0).nonzero().flatten()
        if not len(places):
            return {}
        ranks = torch.tensor(self.gather(rows[places][:, [LOSS, SPREAD]].flatten().tolist())).view(-1, len(places), 2)
        return {first_step + int(place): _cause(*ranks[:, k].T) for k, place in enumerate(places)}

    def _stop(self, step: int, cause: str) -> str:
        seen = self._seen
        finite = f"the last finite loss was {seen.finite_loss:.4g}, at step {seen.finite_step}"
        return (
            f"steps {step - SKIPPED_IN_A_ROW + 1} to {step} were all skipped: at step {step}, {cause}, with lr "
            f"{self.schedule(step):.4g}; {finite if seen.finite_step >= 0 else 'no loss was finite before'}. Lower "
            f"--base-lr (or lengthen --warmup-epochs), raise --temperature (now {self.temperature:g}), try --precision "
            f"fp32, or {VIEWS}"
        )

    def _learning(self, step: int, loss: float, top1: float, spread: float) -> list[str]:
        """What the means of an interval that ends at `step` say."""
        if math.isnan(loss):
            return []
        seen, learnt = self._seen, (self.chance - loss) / (self.chance - self.floor)
        # One image a rank has no spread of its own, whatever is learnt.
        seen.collapsed_for = seen.collapsed_for + 1 if spread < COLLAPSED and learnt < 0.5 else 0
        seen.stuck_for = seen.stuck_for + 1 if learnt < STUCK_LOSS and top1 < STUCK_TOP1 / self.batch else 0
        if seen.collapsed_for >= INTERVALS and seen.collapsed_said < 0:
            seen.collapsed_said = step
            return [
                f"step {step}: the embeddings have collapsed: those of all images are nearly the same (spread "
                f"{spread:.2g}; 0 is all alike, 1 is all over the sphere), so that the loss, {loss:.3f}, has little to "
                f"tell images by. First {VIEWS}: are images blank, or all alike? Else lower --base-lr (lr is "
                f"{self.schedule(step):.4g}) or lengthen --warmup-epochs; checkpoints from here are of little use"
            ]
        pause = AGAIN * self.schedule.total_steps if seen.stuck_said >= 0 else 0
        if seen.stuck_for >= INTERVALS and step - seen.stuck_said >= pause:
            seen.stuck_said = step
            tau = "" if self.temperature == 0.1 else f", and --temperature 0.1 (now {self.temperature:g})"
            return [
                f"step {step}: nothing is being learnt: the loss {loss:.3f} does not go below ln(2N-1) = "
                f"{self.chance:.3f} (perfect embeddings: {self.floor:.3f}), and of the N second views a view finds its "
                f"own in {top1:.2%} of cases (chance: {1 / self.batch:.2%}). First {VIEWS}: do two views of an image "
                f"have something in common that other images lack, or are all images alike? Then try another "
                f"--base-lr (lr is {self.schedule(step):.4g}) or a larger --trust-coefficient{tau}"
            ]
        return []


def _cause(losses: Tensor, spreads: Tensor) -> str:
    """Why no update was possible, from the ranks' losses and spreads, [ranks] each."""
    bad, odd = ((~values.isfinite()).nonzero().flatten().tolist() for values in (losses, spreads))
    if not bad:
        return "every loss was finite, and a gradient was not"
    # A loss has the embeddings of all ranks in it; where those of a few alone are bad, it began there.
    origin = f" (embeddings of {_names(odd, len(losses))})" if odd and odd != bad else ""
    return f"the loss was {losses[bad[0]].item()} on {_names(bad, len(losses))}{origin}"


def _names(ranks: Sequence[int], world: int) -> str:
    if len(ranks) == world > 1:
        return f"all {world} ranks"
    if len(ranks) > 4:
        return f"{len(ranks)} ranks, the first being {ranks[0]}"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

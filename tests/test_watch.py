"""What the watch says of made-up metrics, of one rank and of several; and where it has to be silent."""

import json
import math
import re

import pytest
import torch

from simclr_fast.losses import nt_xent
from simclr_fast.optim import Schedule
from simclr_fast.training.watch import INTERVALS, Diverged, Watch, chance_loss, floor_loss, means

GOOD = (3.0, 0.5, 0.8, 0.0)
NAN = (math.nan, 0.0, math.nan, 1.0)


def alone(values):
    return [values]


def never(values):
    raise AssertionError("ranks talk only where a step was skipped")


def watch(batch=512, temperature=0.1, warmup=100, total=10_000, gather=alone):
    return Watch(batch, temperature, Schedule(4.8, warmup, total), gather)


def rows(*steps):
    return torch.tensor(steps)


def said(watch, row, intervals, start=100, steps=10):
    """All that is said over `intervals` intervals of equal rows."""
    return [text for k in range(intervals) for text in watch.look(start + k * steps, rows(*[row] * steps))]


def test_a_healthy_run_is_silent_and_ranks_do_not_talk():
    looking = watch(gather=never)
    assert said(looking, GOOD, 100, start=0) == []
    assert looking.skipped == 0


def test_means_leave_skipped_steps_out():
    assert means(rows(GOOD, NAN, (5.0, 0.1, 0.6, 0.0))).tolist() == pytest.approx([4.0, 0.3, 0.7])
    gradient = (2.0, 0.9, 0.9, 1.0)
    assert means(rows(GOOD, gradient)).tolist() == pytest.approx([3.0, 0.5, 0.8])
    assert means(rows(NAN, NAN)).isnan().all()


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        ([(math.nan, math.nan)], "the loss was nan on rank 0;"),
        ([(3.0, 0.8), (3.0, 0.8), (math.inf, 0.7), (3.0, 0.8)], "the loss was inf on rank 2;"),
        ([(math.nan, 0.8), (math.nan, math.nan)], r"the loss was nan on all 2 ranks \(embeddings of rank 1\);"),
        ([(math.nan, math.nan)] * 3, "the loss was nan on all 3 ranks;"),
        ([(math.nan, 0.8)] * 2 + [(1.0, 0.8)], "the loss was nan on ranks 0, 1;"),
        ([(1.0, 0.8)] + [(math.nan, 0.8)] * 8, "the loss was nan on 8 ranks, the first being 1;"),
        ([(3.0, 0.8), (3.1, 0.8)], "every loss was finite, and a gradient was not;"),
    ],
)
def test_a_skipped_step_is_said_with_its_rank(ranks, cause):
    loss, spread = ranks[0]
    looking = watch(gather=lambda values: [list(pair) for pair in ranks])
    (text,) = looking.look(811, rows(GOOD, (loss, 0.1, spread, 1.0), GOOD))
    assert re.match(f"step 812: {cause} the step was skipped", text)
    assert looking.skipped == 1


def test_each_rank_passes_loss_and_spread_of_its_skipped_steps():
    passed = []
    looking = watch(gather=lambda values: passed.append(values) or [values, [1.0, 0.5, math.nan, 0.5]])
    (text,) = looking.look(10, rows((2.0, 0.1, 0.7, 1.0), GOOD, (4.0, 0.1, 0.6, 1.0)))
    assert passed == [pytest.approx([2.0, 0.7, 4.0, 0.6])]
    assert text.startswith("step 10: every loss was finite")
    assert text.endswith("(skipped so far up to step 12: 2)")


def test_a_run_of_skipped_steps_is_said_once():
    looking = watch()
    assert len(looking.look(10, rows(GOOD, NAN))) == 1
    assert looking.look(12, rows(NAN, NAN)) == []
    assert len(looking.look(14, rows(GOOD, NAN))) == 1
    assert looking.skipped == 4


@pytest.mark.parametrize("interval", [1, 3, 50])
def test_five_in_a_row_stop_the_run(interval):
    steps = [GOOD] * 8 + [(2.5, 0.5, 0.8, 0.0)] + [NAN] * 4 + [GOOD, (1.25, 0.5, 0.8, 0.0)] + [NAN] * 5 + [GOOD] * 9
    looking = watch(gather=lambda values: [[3.0, 0.5] * (len(values) // 2), values])
    with pytest.raises(Diverged) as raised:
        [looking.look(100 + k, rows(*steps[k : k + interval])) for k in range(0, len(steps), interval)]
    text = str(raised.value)
    assert text.startswith("steps 115 to 119 were all skipped: at step 119, the loss was nan on rank 1, with lr 4.8")
    assert "last finite loss was 1.25, at step 114" in text
    for word in ("--base-lr", "--temperature", "preview DATA"):
        assert word in text


def test_a_run_that_never_had_a_finite_loss():
    with pytest.raises(Diverged, match=r"steps 0 to 4 were all .* no loss was finite before"):
        watch().look(0, rows(*[NAN] * 5))


def test_gradients_that_overflow_stop_the_run_too():
    with pytest.raises(Diverged, match="every loss was finite, and a gradient was not"):
        watch().look(0, rows(*[(3.0, 0.5, 0.8, 1.0)] * 5))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("batch", [2, 8, 33])
def test_the_floor_is_the_loss_of_perfect_embeddings(batch, temperature):
    corners = torch.eye(batch, dtype=torch.float64) - 1 / batch  # a simplex: as far apart as can be
    assert nt_xent(corners, corners, temperature, backend="reference").item() == pytest.approx(
        floor_loss(batch, temperature), rel=1e-6
    )
    alike = torch.ones(batch, 4, dtype=torch.float64)
    assert nt_xent(alike, alike, temperature, backend="reference").item() == pytest.approx(chance_loss(batch))
    torch.manual_seed(0)
    z = torch.randn(batch, 16, dtype=torch.float64)
    assert nt_xent(z, z, temperature, backend="reference").item() > floor_loss(batch, temperature)


def test_a_loss_at_chance_is_said_and_again_after_a_quarter_of_the_run():
    looking = watch(total=10_000)
    stuck = (chance_loss(512), 1 / 512, 0.9, 0.0)
    assert said(looking, stuck, INTERVALS - 1) == []
    (text,) = said(looking, stuck, 1, start=140)
    assert text.startswith("step 149: nothing is being learnt: the loss 6.930 does not go below ln(2N-1) = 6.930")
    assert "perfect embeddings: 0.044" in text
    assert "preview DATA page.html" in text
    assert said(looking, stuck, 99, start=150) == []
    assert said(looking, stuck, 200, start=2449)[0].startswith("step 2658")


@pytest.mark.parametrize(
    ("row", "batch", "temperature"),
    [
        ((6.87, 0.02, 0.9, 0.0), 512, 0.5),  # 1 % below chance, and the pairs are found ten times as often
        ((4.95, 0.9, 0.9, 0.0), 512, 0.5),  # as good as can be: the floor is 4.93
        ((6.84, 0.9, 0.9, 0.0), 512, 10.0),  # the floor, 1.4 % below chance
        ((6.92, 0.9, 0.9, 0.0), 512, 100.0),  # the floor, 0.15 % below chance
        ((5.81, 0.075, 0.9, 0.0), 60, 0.1),  # above chance as at any start, and the pairs are found
        ((math.log(65535 * 2 - 1) - 0.11, 4 / 65536, 0.9, 0.0), 65536, 0.5),  # top-1 poor, loss on its way
    ],
)
def test_no_false_alarm_where_chance_and_floor_are_near(row, batch, temperature):
    assert said(watch(batch, temperature), row, 50) == []


def test_nothing_is_stuck_during_the_warm_up():
    stuck = (chance_loss(512), 1 / 512, 0.001, 0.0)
    assert said(watch(warmup=100), stuck, 10, start=0) == []
    assert said(watch(warmup=10_000), stuck, 100, start=0) == []


def test_single_intervals_are_not_called_stuck():
    looking, stuck = watch(), (chance_loss(512), 1 / 512, 0.9, 0.0)
    for k in range(20):
        assert looking.look(200 + k, rows(GOOD if k % INTERVALS == 0 else stuck)) == []


def test_collapsed_embeddings_are_said_once():
    looking = watch()
    collapsed = (chance_loss(512) - 0.02, 0.3, 0.002, 0.0)  # tiny differences still order the images
    assert said(looking, collapsed, INTERVALS - 1) == []
    (text,) = said(looking, collapsed, 500)
    assert "the embeddings have collapsed" in text
    assert "spread 0.002" in text


def test_one_image_a_rank_is_no_collapse():
    assert said(watch(), (1.0, 0.9, 0.0, 0.0), 50) == []


def test_intervals_without_an_update_say_nothing_of_learning():
    looking = watch()
    for k in range(20):
        looking.look(200 + 5 * k, rows(*[NAN] * 4))
        looking.look(204 + 5 * k, rows(GOOD))
    assert looking.state_dict()["stuck_for"] == 0


def test_a_resumed_watch_goes_on_as_the_same_one():
    stuck = (chance_loss(512), 1 / 512, 0.9, 0.0)
    looking = watch()
    looking.look(200, rows(*[GOOD] * 2, NAN))
    said(looking, stuck, INTERVALS - 1, start=203)
    looking.look(243, rows(stuck, *[NAN] * 3))
    state = json.loads(json.dumps(looking.state_dict()))
    again = watch()
    again.load_state_dict(state)
    assert again.state_dict() == looking.state_dict()
    assert again.skipped == 4
    with pytest.raises(Diverged, match=r"steps 244 to 248 .* last finite loss was 6.93, at step 243"):
        again.look(247, rows(NAN, NAN))
    fresh = watch()
    assert fresh.look(247, rows(NAN, NAN))

"""The exact linear evaluation on features that are there already: 45 values of l2 tried, and the fit to all.

    python bench/linear_bench.py [--bank 50000] [--queries 10000] [--features 512] [--data DIR --checkpoint RUN]

Features  as for knn_bench.py: made up, or those of an encoder.
Sweep     seconds of 45 fits to nine tenths of them, each scored on the rest, as `evaluate linear` does.
Fit       seconds of one fit to all, in float64, at the l2 that was chosen; from the sweep's, as there, and from 0.
Others    scikit-learn's LogisticRegression (L-BFGS) at that l2 alone, from 0, float64: 45 of them would be a sweep.
Excess    what the mean objective is above ours, nats an image: negative where theirs is the lower one.

The result is a line of bench/results/linear.jsonl ($OUT/linear.jsonl, or FILE of --json).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from _harness import append, progress
from knn_bench import Sides, made_up, of_encoder, parsed
from torch import Tensor

from simclr_fast.evaluation import logistic
from simclr_fast.evaluation.measures import top_k

T = TypeVar("T")
HELD_OUT = 10  # every tenth


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def objective(fit: logistic.Fit, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy + l2 |W|^2 / n, nats an image."""
    value = torch.nn.functional.cross_entropy(fit.scores(x.double()), y) + fit.l2 * fit.weight.square().sum() / len(x)
    return float(value)


def scikit_learn(x: Tensor, y: Tensor, l2: float) -> tuple[float, logistic.Fit]:
    linear_model = importlib.import_module("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / (2 * l2), tol=1e-6, max_iter=10_000)
    seconds, _ = timed(lambda: model.fit(x.double().cpu().numpy(), y.cpu().numpy()))
    weight, bias = torch.from_numpy(model.coef_).to(x.device), torch.from_numpy(model.intercept_).to(x.device)
    return seconds, logistic.Fit(weight, bias, l2, 0.0, int(model.n_iter_.max()), True)


def measure(args: argparse.Namespace, sides: Sides) -> dict[str, Any]:
    x, y, tested, truth = sides
    classes, held = int(y.max()) + 1, torch.arange(len(x), device=x.device) % HELD_OUT == 0
    progress("sweep")
    seconds, tried = timed(
        lambda: logistic.sweep(x[~held], y[~held], x[held], lambda s: top_k(s, y[held], 1), classes=classes)
    )
    chosen = logistic.best(tried)
    progress("fits")
    warm, fit = timed(lambda: logistic.fit(x, y, chosen.l2, classes=classes, start=chosen.fit))
    cold, _ = timed(lambda: logistic.fit(x, y, chosen.l2, classes=classes))
    line = {
        "images": len(x), "features": x.shape[1], "classes": classes, "source": args.data or "made up",
        "threads": torch.get_num_threads(), "sweep_s": seconds, "values": len(tried),
        "iterations": [one.fit.iterations for one in tried], "converged": all(one.fit.converged for one in tried),
        "l2": chosen.l2, "fit_s": warm, "fit_from_0_s": cold, "excess_nats": fit.excess,
        "top1": top_k(fit.scores(tested), truth, 1),
    }  # fmt: skip
    try:
        theirs, other = scikit_learn(x, y, chosen.l2)
    except ImportError as error:
        return line | {"scikit_learn": f"not installed ({error})"}
    above = objective(other, x, y) - objective(fit, x, y)
    return line | {"scikit_learn_s": theirs, "scikit_learn_excess_nats": above, "it_over_fit_from_0": theirs / cold}


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv, __doc__)
    sides = of_encoder(args.data, args.checkpoint) if args.data else made_up(args.bank, args.queries, args.features)
    if torch.cuda.is_available():
        sides = tuple(side.cuda() for side in sides)  # type: ignore[assignment]
    line = append("linear", measure(args, sides), args.json)
    about = f"{line['images']:,} x {line['features']}, {line['classes']} classes, {line['source']}"
    print(f"{about}; {line['threads']} threads; top-1 {line['top1']:.1%}")
    print(f"45 values of l2: {line['sweep_s']:.1f} s, {sum(line['iterations'])} iterations")
    print(f"fit to all: {line['fit_s']:.1f} s, from 0: {line['fit_from_0_s']:.1f} s")
    if "scikit_learn_s" in line:
        print(
            f"scikit-learn, that l2 alone: {line['scikit_learn_s']:.1f} s, {line['it_over_fit_from_0']:.1f} times ours;"
            f" {line['scikit_learn_excess_nats']:.0e} nats an image above"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

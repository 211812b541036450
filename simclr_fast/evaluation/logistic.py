"""Logistic regression on kept features, to its exact minimum: one fit, or a sweep over the L2 regulariser.

Minimised over weights W [K, d] and biases b [K]:

    sum_i cross_entropy(W x_i + b, y_i) + l2 |W|^2

summed over the images, b without penalty; scikit-learn's C is 1 / (2 l2). That is the convention of
google-research/google-research, linear_eval/linear_eval.py, by the author of the paper's protocol (appendix B.8), which
gives 45 values of l2 and no formula. With several labels an image, the cross-entropies of K independent binary
classifiers, each against the rest, take the place of the softmax's.

L-BFGS runs in the features' principal axes: centring and rotating them changes neither the minimum (b takes up the
mean, and |W| is the same) nor the classifier, and there the Hessian is nearly diagonal. A step's length is searched on
the scores, which are linear in it, so that it costs no product with the features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_fast.config import ConfigError

Seen = deque[tuple[Tensor, Tensor]]  # steps, and changes of the mean loss's gradient, without the penalty's
L2_VALUES = tuple(10.0 ** (-6 + 11 * k / 44) for k in range(45))  # appendix B.8
PAIRS = 100, 2**26  # that L-BFGS remembers at most, and numbers in them; ten are always remembered
LEAST_SPREAD = 1e-6  # p (1 - p) of a class, in the scaling alone: a class may be told apart without a doubt


@dataclass(frozen=True)
class Fit:
    """A classifier."""

    weight: Tensor  # [K, d] float64
    bias: Tensor  # [K] float64; those of a softmax have mean 0
    l2: float
    excess: float
    """What the objective, a mean over the images, is above its minimum by the gradient g and the scaling D of the
    Hessian: g D^-1 g / 2, in nats."""
    iterations: int
    converged: bool
    """Whether `excess` is within the tolerance."""

    def scores(self, x: Tensor) -> Tensor:
        """Logits [m, K] of features [m, d], in their precision."""
        return x @ self.weight.to(x).T + self.bias.to(x)


@dataclass(frozen=True)
class Tried:
    """A value of a sweep."""

    l2: float
    score: float
    fit: Fit


def fit(
    x: Tensor, y: Tensor, l2: float, *, classes: int | None = None, start: Fit | None = None,
    tolerance: float = 1e-9, dtype: torch.dtype = torch.float64, limit: int = 2000,
) -> Fit:  # fmt: skip
    """The classifier that minimises the objective, on the device of `x`.

    Args:
        x: features [n, d].
        y: classes, int64 [n]; or, for several an image, [n, K] of 1 (has it), 0 (has not) and -1 (not said, left out).
        classes: K, for the first kind.
        start: where to begin, else at 0.
        tolerance: `excess` at which to stop, nats for each image.
        dtype: of the products with the features; all else is float64.
        limit: of iterations.
    Raises:
        ConfigError: a feature that is not finite, a class that there is not, shapes that do not match, l2 not positive.
    """
    problem = _Problem(x, y, classes, dtype)
    problem.begin(start)
    return problem.minimise(l2, tolerance, limit)


def sweep(
    x: Tensor, y: Tensor, held_out: Tensor, score: Callable[[Tensor], float], *, classes: int | None = None,
    values: Sequence[float] = L2_VALUES, tolerance: float = 1e-8, dtype: torch.dtype = torch.float32, limit: int = 1000,
    progress: Callable[[int, float, float], None] = lambda done, l2, found: None,
) -> list[Tried]:  # fmt: skip
    """A classifier for each l2, and its score on images that were held out; by growing l2.

    Each fit starts from that of the next larger l2. Arguments as for `fit`.

    Args:
        held_out: features [m, d].
        score: logits [m, K] of these to a number, the higher the better.
        progress: is told how many are done, and the last l2 and score.
    """
    problem, found = _Problem(x, y, classes, dtype), list[Tried]()
    for l2 in sorted(values, reverse=True):
        fitted = problem.minimise(l2, tolerance, limit)
        found.append(Tried(l2, score(fitted.scores(held_out.float())), fitted))
        progress(len(found), l2, found[-1].score)
    return found[::-1]


def best(tried: Sequence[Tried]) -> Tried:
    """The highest score; of equals the one in the middle, for those at the ends may be so by chance."""
    highest = max(one.score for one in tried)
    equals = sorted((one for one in tried if one.score == highest), key=lambda one: one.l2)
    return equals[len(equals) // 2]


class _Softmax:
    """Cross-entropy of one class an image. All methods take logits [K, n]: sums over the classes then run over rows."""

    def __init__(self, y: Tensor) -> None:
        self.y = y[None]

    def residual(self, z: Tensor) -> Tensor:
        """Gradient for the logits, [K, n]."""
        p = z.softmax(0)
        return p.scatter_add_(0, self.y, p.new_full((1, 1), -1.0).expand_as(self.y))

    def spread(self, z: Tensor) -> Tensor:
        """Mean p (1 - p) of each class, [K]."""
        p = z.softmax(0)
        return (p * (1 - p)).mean(1, dtype=torch.float64)

    def along(self, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of the summed loss when the logits move by `d`."""
        p = z.softmax(0)
        moved = p * d
        mean = moved.sum(0)
        slope = (mean - d.gather(0, self.y)[0]).sum(dtype=torch.float64)
        return slope, (moved.mul_(d).sum(0) - mean.square()).sum(dtype=torch.float64)


class _Binary:
    """Cross-entropy of K answers, yes or no, an image."""

    def __init__(self, y: Tensor, dtype: torch.dtype) -> None:
        self.said, self.y = (y.T >= 0).to(dtype), (y.T > 0).to(dtype)

    def residual(self, z: Tensor) -> Tensor:
        return (z.sigmoid() - self.y) * self.said

    def spread(self, z: Tensor) -> Tensor:
        p = z.sigmoid()
        return (p * (1 - p) * self.said).mean(1, dtype=torch.float64)

    def along(self, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        p, d = z.sigmoid(), d * self.said
        return ((p - self.y) * d).sum(dtype=torch.float64), (p * (1 - p) * d.square()).sum(dtype=torch.float64)


class _Problem:
    """Features in their principal axes with their labels, and where L-BFGS stands.

    `theta` [K, d + 1] has the biases in its last column, for which `rows` [n, d + 1] ends in a column of ones.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int | None, dtype: torch.dtype) -> None:
        count = _check(x, y, classes)
        self.softmax = y.ndim == 1
        y = y.to(x.device)
        self.loss: _Softmax | _Binary = _Softmax(y) if self.softmax else _Binary(y, dtype)
        self.n, features = x.shape
        self.mean = x.mean(0, dtype=torch.float64)
        self.basis = self._axes(x)
        self.rows = torch.empty(self.n, features + 1, dtype=dtype, device=x.device)
        basis = self.basis.to(dtype)
        for part, out in zip(x.split(8192), self.rows.split(8192), strict=True):
            out[:, :features] = (part.double() - self.mean).to(dtype) @ basis
        self.rows[:, features] = 1
        self.variance = sum(part.square().sum(0).double() for part in self.rows.split(8192)) / self.n
        self.penalised = torch.ones_like(self.variance)
        self.penalised[-1] = 0
        self.theta = torch.zeros(count, features + 1, dtype=torch.float64, device=x.device)
        most, numbers = PAIRS
        self.pairs: Seen = deque(maxlen=max(10, min(most, numbers // self.theta.numel())))

    def _axes(self, x: Tensor) -> Tensor:
        """Orthonormal columns [d, d], float64."""
        gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in x.split(8192):
            centred = (part.double() - self.mean).float()
            gram += (centred.T @ centred).double()
        return torch.linalg.eigh(gram).eigenvectors

    def begin(self, start: Fit | None) -> None:
        """Stand at a classifier."""
        if start is not None:
            weight, bias = start.weight.to(self.theta), start.bias.to(self.theta)
            self.theta[:, :-1], self.theta[:, -1] = weight @ self.basis, bias + weight @ self.mean

    def minimise(self, l2: float, tolerance: float, limit: int) -> Fit:
        """Go on from where it stands to the minimum for this l2."""
        if not l2 > 0:
            raise ConfigError(f"l2 must be positive, got l2={l2}")
        penalty = 2 * l2 / self.n * self.penalised
        pairs = _Pairs(self.pairs, penalty)
        z = self._logits(self.theta)
        gradient = self._gradient(z)
        scaling = self._scaling(z) + penalty
        iterations = 0
        while True:
            total = gradient + penalty * self.theta
            excess = 0.5 * (total.square() / scaling).sum().item()
            if excess <= tolerance or iterations == limit:
                break
            step = -pairs.newton(total, scaling)
            moved = self._logits(step)
            t = self._length(z, moved, step, penalty)
            if t == 0:  # rounding has spoilt the pairs, or is all that there is left
                if not pairs.known:
                    break
                pairs.clear()
                continue
            self.theta = self.theta + t * step
            iterations += 1
            z = z + t * moved if iterations % 20 else self._logits(self.theta)  # rounding does not add up
            before, gradient = gradient, self._gradient(z)
            pairs.add(t * step, gradient - before)
            if iterations % 10 == 0:
                scaling = self._scaling(z) + penalty
        weight = self.theta[:, :-1] @ self.basis.T
        bias = self.theta[:, -1] - weight @ self.mean
        bias = bias - bias.mean() if self.softmax else bias
        return Fit(weight, bias, l2, excess, iterations, excess <= tolerance)

    def _logits(self, theta: Tensor) -> Tensor:
        return theta.to(self.rows.dtype) @ self.rows.T

    def _gradient(self, z: Tensor) -> Tensor:
        """Of the mean loss, [K, d + 1] float64."""
        return (self.loss.residual(z) @ self.rows).double() / self.n

    def _scaling(self, z: Tensor) -> Tensor:
        """About the diagonal of the mean loss's Hessian, [K, d + 1]."""
        return self.loss.spread(z).clamp(min=LEAST_SPREAD)[:, None] * self.variance

    def _length(self, z: Tensor, moved: Tensor, step: Tensor, penalty: Tensor) -> float:
        """How far to go along a step: where the slope, which only grows, is next to nothing. By Newton's method."""
        linear, square = (penalty * self.theta * step).sum(), (penalty * step.square()).sum()

        def along(t: float) -> tuple[float, float]:
            slope, curvature = self.loss.along(z + t * moved, moved)
            return (slope / self.n + linear + t * square).item(), (curvature / self.n + square).item()

        first = along(0.0)[0]
        if first >= 0:
            return 0.0
        t, low, high = 1.0, 0.0, float("inf")
        for _ in range(20):
            slope, curvature = along(t)
            if abs(slope) <= 0.1 * abs(first):
                return t
            low, high = (t, high) if slope < 0 else (low, t)
            wanted = t - slope / curvature if curvature > 0 else high
            t = min(wanted, 10 * t) if low < wanted < high else (low + high) / 2 if high < float("inf") else 10 * t
        return low


class _Pairs:
    """The inverse Hessian as L-BFGS knows it, for one penalty.

    The penalty's part of the Hessian is known, so that pairs from the fit for another l2 hold for this one too.
    """

    def __init__(self, seen: Seen, penalty: Tensor) -> None:
        self.seen, self.penalty = seen, penalty
        self.known: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=seen.maxlen)
        for s, y in seen:
            self._know(s, y)

    def add(self, s: Tensor, y: Tensor) -> None:
        """A step, and the change of the gradient without the penalty's."""
        self.seen.append((s, y))
        self._know(s, y)

    def clear(self) -> None:
        self.seen.clear()
        self.known.clear()

    def _know(self, s: Tensor, y: Tensor) -> None:
        y = y + self.penalty * s
        curvature = (s * y).sum()
        if curvature > 0:
            self.known.append((s, y, 1 / curvature))

    def newton(self, gradient: Tensor, scaling: Tensor) -> Tensor:
        """The inverse's product with a gradient; `scaling` is the Hessian's diagonal."""
        q, weights = gradient, []
        for s, y, rho in reversed(self.known):
            weights.append(rho * (s * q).sum())
            q = q - weights[-1] * y
        q = q / scaling
        if self.known:
            s, y, rho = self.known[-1]
            q = q / (rho * (y.square() / scaling).sum())
        for (s, y, rho), weight in zip(self.known, reversed(weights), strict=True):
            q = q + (weight - rho * (y * q).sum()) * s
        return q


def _check(x: Tensor, y: Tensor, classes: int | None) -> int:
    """K."""
    if x.ndim != 2 or not len(x) or len(x) != len(y):
        raise ConfigError(f"features must be [n, d] with n labels, n >= 1, got {list(x.shape)} with {list(y.shape)}")
    bad = int((~x.isfinite().all(1)).sum())
    if bad:
        raise ConfigError(f"features must be finite, got NaN or infinity for {bad:,} of {len(x):,} images")
    if y.ndim == 2:
        if classes not in (None, y.shape[1]):
            raise ConfigError(f"classes must be the number of columns of the labels, {y.shape[1]}, got {classes=}")
        return y.shape[1]
    known = int(y.max()) + 1 if classes is None else classes
    if int(y.min()) < 0 or int(y.max()) >= known:
        raise ConfigError(f"labels must be in [0, {known}), got {int(y.min())} to {int(y.max())}")
    return known

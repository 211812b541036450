"""From a decoded image to a view, on the CPU, compiled: crop, resize, jitter, gray, blur, flip, normalise.

Between resize and flip a view is planes [3, S * S], float32 in [0, 1], small enough for the cache. The operators
are those of torchvision.transforms.v2.functional, or of TensorFlow where `tf` is set, each clamped to [0, 1].
"""

import numpy as np

from simclr_fast.compiled import compiled as _compiled

# No fastmath: a process that compiles and one that loads the compiled code would round differently.
LANES = 16  # sums side by side: one alone would wait for itself
_ZERO, _ONE, _TINY = np.float32(0), np.float32(1), np.float32(1e-20)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)


@_compiled
def render(out, image, row, tf, mean, std, radius):
    """One view of an image [H, W, 3] uint8, into `out` [S, S, 3] float32.

    `row` is one of `Params.packed`; tf, mean, std (float32 [3]) and radius are the policy's `constants`.
    """
    size = out.shape[0]
    planes = np.empty((3, size * size), np.float32)
    _resize(planes, size, image, int(row[0]), int(row[1]), int(row[2]), int(row[3]), tf)
    if row[5]:
        _jitter(planes, row, tf)
    if row[6]:
        _gray(planes)
    _brightness(planes, _ONE)  # clamps
    if row[15] > 0 and radius > 0:
        _blur(planes, size, row[15], radius, tf)
    _store(out, planes, row[4] > 0, mean, std)


@_compiled
def _jitter(planes, row, tf):
    for k in range(11, 15):
        if row[k] == 0:
            _brightness(planes, row[7])
        elif row[k] == 1:
            _contrast(planes, row[8], tf)
        elif row[k] == 2:
            _saturation(planes, row[9], tf)
        else:
            _hue(planes, row[10])


@_compiled
def _clamp(x):
    return min(max(x, _ZERO), _ONE)


@_compiled
def _cubic(x):
    """Keys' kernel, a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


@_compiled
def _taps(length, size, antialias):
    """(first, weights): pixel i is the sum over k of weights[i, k] * input[first[i] + k]; the edge cuts taps off."""
    scale = length / size
    stretch = max(scale, 1.0) if antialias else 1.0
    first = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(4 * stretch)) + 1), np.float32)
    for i in range(size):
        centre = scale * (i + 0.5)
        first[i] = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), length)
        total = 0.0
        for j in range(first[i], last):
            total += _cubic((j + 0.5 - centre) / stretch)
        for j in range(first[i], last):
            weights[i, j - first[i]] = _cubic((j + 0.5 - centre) / stretch) / total
    return first, weights


@_compiled
def _resize(planes, size, image, top, left, height, width, tf):
    """Bicubic, of the window alone: no pixel outside it counts. Antialiased but for `tf`."""
    tops, down = _taps(height, size, not tf)
    lefts, across = _taps(width, size, not tf)
    line = np.empty(width * 3, np.float32)
    for y in range(size):
        line[:] = _ZERO
        for k in range(min(down.shape[1], height - tops[y])):
            weight = down[y, k] * np.float32(1 / 255)
            source = image[top + tops[y] + k].reshape(-1)[3 * left : 3 * (left + width)]
            for i in range(line.size):
                line[i] += weight * np.float32(source[i])
        for x in range(size):
            r, g, b = _ZERO, _ZERO, _ZERO
            for k in range(min(across.shape[1], width - lefts[x])):
                at = 3 * (lefts[x] + k)
                r += across[x, k] * line[at]
                g += across[x, k] * line[at + 1]
                b += across[x, k] * line[at + 2]
            planes[0, y * size + x] = r
            planes[1, y * size + x] = g
            planes[2, y * size + x] = b
    if not tf:  # which clamps after the next operator only
        _brightness(planes, _ONE)


@_compiled
def _brightness(planes, factor):
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _clamp(factor * plane[i])


@_compiled
def _contrast(planes, factor, tf):
    """About the mean of the gray image; in `tf` about each channel's."""
    means = np.empty(3, np.float32)
    for c in range(3):
        means[c] = _mean(planes[c])
    gray = _RED * means[0] + _GREEN * means[1] + _BLUE * means[2]
    for c in range(3):
        plane = planes[c]
        shift = (_ONE - factor) * (means[c] if tf else gray)
        for i in range(plane.size):
            plane[i] = _clamp(factor * plane[i] + shift)


@_compiled
def _mean(plane):
    sums, whole = np.zeros(LANES, np.float32), plane.size // LANES * LANES
    for first in range(0, whole, LANES):
        for k in range(LANES):
            sums[k] += plane[first + k]
    for i in range(whole, plane.size):
        sums[0] += plane[i]
    return sums.sum() / np.float32(plane.size)


@_compiled
def _saturation(planes, factor, tf):
    """Away from gray; in `tf` in HSV, whose saturation ends at 1."""
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(r.size):
        anchor, f = _RED * r[i] + _GREEN * g[i] + _BLUE * b[i], factor
        if tf:
            anchor = max(r[i], g[i], b[i])
            f = min(factor, anchor / max(anchor - min(r[i], g[i], b[i]), _TINY))
        r[i] = _clamp(anchor + f * (r[i] - anchor))
        g[i] = _clamp(anchor + f * (g[i] - anchor))
        b[i] = _clamp(anchor + f * (b[i] - anchor))


@_compiled
def _hue(planes, turn):
    """HSV's hue plus `turn`, in closed form: V - C * clamp(min(k, 4 - k)), k = (n + hue) mod 6, n = 5, 3, 1."""
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(r.size):
        value = max(r[i], g[i], b[i])
        chroma = value - min(r[i], g[i], b[i])
        inverse = _ONE / max(chroma, _TINY)
        hue = (r[i] - g[i]) * inverse + np.float32(4)
        hue = (b[i] - r[i]) * inverse + np.float32(2) if value == g[i] else hue
        hue = (g[i] - b[i]) * inverse if value == r[i] else hue
        hue += np.float32(6) * turn
        r[i] = _channel(value, chroma, hue + np.float32(5))
        g[i] = _channel(value, chroma, hue + np.float32(3))
        b[i] = _channel(value, chroma, hue + _ONE)


@_compiled
def _channel(value, chroma, k):
    k -= np.float32(6) * np.floor(k * np.float32(1 / 6))
    return _clamp(value - chroma * _clamp(min(k, np.float32(4) - k)))


@_compiled
def _gray(planes):
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(r.size):
        gray = _RED * r[i] + _GREEN * g[i] + _BLUE * b[i]
        r[i], g[i], b[i] = gray, gray, gray


@_compiled
def _blur(planes, size, sigma, radius, tf):
    """Separable Gaussian; taps beyond 4 sigma, under 1e-4 of the sum, are left out."""
    reach = min(radius, int(np.ceil(4 * sigma)))
    weights = np.empty(2 * reach + 1, np.float32)
    total = _ZERO
    for k in range(weights.size):
        weights[k] = np.exp(np.float32(-0.5) * (np.float32(k - reach) / sigma) ** 2)
        total += weights[k]
    for k in range(weights.size):
        weights[k] /= total
    scratch = np.empty((size, size), np.float32)
    for c in range(3):
        plane = planes[c].reshape(size, size)
        for _ in range(2):
            _blur_down(scratch, plane, weights, tf)
            for y in range(size):
                for x in range(size):
                    plane[x, y] = scratch[y, x]


@_compiled
def _blur_down(out, plane, weights, tf):
    """Down the columns; rows beyond the edge are reflected, in `tf` zero."""
    size, reach = plane.shape[0], weights.size // 2
    for y in range(size):
        line = out[y]
        line[:] = _ZERO
        for k in range(weights.size):
            at = abs(y + k - reach)
            at = at if at < size else 2 * size - 2 - at
            if tf and at != y + k - reach:
                continue
            source = plane[at]
            for x in range(line.size):
                line[x] += weights[k] * source[x]


@_compiled
def _store(out, planes, flip, mean, std):
    size = out.shape[0]
    for y in range(size):
        line = out[y]
        for c in range(3):
            plane, scale = planes[c, y * size : (y + 1) * size], _ONE / std[c]
            if flip:
                plane = plane[::-1]
            for x in range(size):
                line[x, c] = (plane[x] - mean[c]) * scale

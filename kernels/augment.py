"""Views from uint8 images in two launches: crop, colour jitter in any order, gray, blur, flip, normalise.

A row of `params` is one view, 16 numbers (simclr_fast.data.policy, `Params.packed`):

    0-3    y, x, height, width of the crop window     7-10   brightness, contrast, saturation factors; hue in turns
    4-6    flip, jitter, gray: 0 or 1                 11-14  the order of those four     15  sigma of the blur

`mean_kernel` applies what comes before contrast and sums the pixels, `view_kernel` applies everything. An image is read
once by each, and the first passes over those without jitter. R, G, B are in [0, 1]; S is the side of a view.

The blur is two products with a banded matrix for every tile of BLOCK x BLOCK pixels, of which HALO at each side
belong to the neighbours. Where a view is not blurred a program takes every tiles-th chunk of its pixels instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # side of a tile that is blurred
CHUNK = 2048  # pixels at a time where nothing is blurred
MAX_VIEWS = 65535  # the second dimension of a grid


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _cubic(x):
    """Keys' kernel, a = -1/2."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _segment(first, length, end):
    """Of a window's axis: first and length, cut back to [0, end)."""
    first = tl.minimum(tl.maximum(first.to(tl.int32), 0), end - 1)
    return first, tl.minimum(tl.maximum(length.to(tl.int32), 1), end - first)


@triton.jit
def _image(image_ptr, index_ptr, view, N, H, W):
    which = tl.minimum(tl.maximum(tl.load(index_ptr + view), 0), N - 1)
    return image_ptr + which * H * W * 3


@triton.jit
def _taps(i, length, S, TF: tl.constexpr):
    """Of pixels i of a resized axis: the centre, first and end of their taps, and how much a tap is stretched."""
    scale = length / S
    stretch = 1.0 if TF else tl.maximum(scale, 1.0)
    centre = scale * (i.to(tl.float32) + 0.5)
    first = tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), length)
    return centre, first, end, stretch


@triton.jit
def _weight(at, centre, end, stretch):
    return tl.where(at < end, _cubic((at.to(tl.float32) + 0.5 - centre) / stretch), 0.0)


@triton.jit
def _resized(image_ptr, row_ptr, y, x, exists, H, W, S, TF: tl.constexpr):
    """Pixels (y, x) of the window resized to S x S, bicubic, antialiased but for TF; no taps beyond its edge."""
    top, height = _segment(tl.load(row_ptr), tl.load(row_ptr + 2), H)
    left, width = _segment(tl.load(row_ptr + 1), tl.load(row_ptr + 3), W)
    y_centre, y_first, y_end, y_stretch = _taps(y, height, S, TF)
    x_centre, x_first, x_end, x_stretch = _taps(x, width, S, TF)
    y_taps, x_taps = tl.ceil(4.0 * y_stretch).to(tl.int32) + 1, tl.ceil(4.0 * x_stretch).to(tl.int32) + 1
    total = tl.zeros(exists.shape, tl.float32)
    r, g, b = total, total, total
    for j in range(y_taps):
        y_at = y_first + j
        y_weight = _weight(y_at, y_centre, y_end, y_stretch)
        for k in range(x_taps):
            x_at = x_first + k
            weight = y_weight * _weight(x_at, x_centre, x_end, x_stretch)
            tap = image_ptr + ((top + y_at) * W + left + x_at) * 3
            inside = exists & (y_at < y_end) & (x_at < x_end)
            r += weight * tl.load(tap, mask=inside, other=0).to(tl.float32)
            g += weight * tl.load(tap + 1, mask=inside, other=0).to(tl.float32)
            b += weight * tl.load(tap + 2, mask=inside, other=0).to(tl.float32)
            total += weight
    total = 255.0 * tl.where(exists, total, 1.0)
    r, g, b = r / total, g / total, b / total
    if not TF:  # which clamps after the next operator only
        r, g, b = _clamp(r), _clamp(g), _clamp(b)
    return r, g, b


@triton.jit
def _pixels(image_ptr, row_ptr, y, x, exists, H, W, S, CROP: tl.constexpr, TF: tl.constexpr):
    """R, G and B of pixels (y, x) of a view before any colour operator."""
    if CROP:
        r, g, b = _resized(image_ptr, row_ptr, y, x, exists, H, W, S, TF)
    else:
        at = image_ptr + (y * W + x) * 3
        r = tl.load(at, mask=exists, other=0).to(tl.float32) / 255.0
        g = tl.load(at + 1, mask=exists, other=0).to(tl.float32) / 255.0
        b = tl.load(at + 2, mask=exists, other=0).to(tl.float32) / 255.0
    return r, g, b


@triton.jit
def _channel(value, chroma, k):
    k -= 6.0 * tl.floor(k * (1.0 / 6.0))
    return _clamp(value - chroma * _clamp(tl.minimum(k, 4.0 - k)))


@triton.jit
def _hue(r, g, b, turn):
    """HSV's hue plus `turn`, in closed form: V - C * clamp(min(k, 4 - k)), k = (n + hue) mod 6, n = 5, 3, 1."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    inverse = 1.0 / tl.maximum(chroma, 1e-20)
    hue = tl.where(value == g, (b - r) * inverse + 2.0, (r - g) * inverse + 4.0)
    hue = tl.where(value == r, (g - b) * inverse, hue) + 6.0 * turn
    return _channel(value, chroma, hue + 5.0), _channel(value, chroma, hue + 3.0), _channel(value, chroma, hue + 1.0)


@triton.jit
def _saturation(r, g, b, factor, TF: tl.constexpr):
    """Away from gray; in TF in HSV, whose saturation ends at 1."""
    if TF:
        anchor = tl.maximum(tl.maximum(r, g), b)
        factor = tl.minimum(factor, anchor / tl.maximum(anchor - tl.minimum(tl.minimum(r, g), b), 1e-20))
    else:
        anchor = _gray(r, g, b)
    return (
        _clamp(anchor + factor * (r - anchor)),
        _clamp(anchor + factor * (g - anchor)),
        _clamp(anchor + factor * (b - anchor)),
    )


@triton.jit
def _operator(op, r, g, b, row_ptr, TF: tl.constexpr):
    """Brightness, saturation or hue."""
    if op == 0:
        factor = tl.load(row_ptr + 7)
        r, g, b = _clamp(factor * r), _clamp(factor * g), _clamp(factor * b)
    elif op == 2:
        r, g, b = _saturation(r, g, b, tl.load(row_ptr + 9), TF)
    else:
        r, g, b = _hue(r, g, b, tl.load(row_ptr + 10))
    return r, g, b


@triton.jit
def _coloured(r, g, b, row_ptr, red, green, blue, TF: tl.constexpr):
    """Jitter and gray; red, green, blue are what contrast is about."""
    if tl.load(row_ptr + 5) != 0:
        for k in range(11, 15):
            op = tl.load(row_ptr + k).to(tl.int32)
            if op == 1:
                factor = tl.load(row_ptr + 8)
                r = _clamp(red + factor * (r - red))
                g = _clamp(green + factor * (g - green))
                b = _clamp(blue + factor * (b - blue))
            else:
                r, g, b = _operator(op, r, g, b, row_ptr, TF)
    if tl.load(row_ptr + 6) != 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    return _clamp(r), _clamp(g), _clamp(b)


#   reads  the image once where there is jitter;  writes  3 numbers a chunk
@triton.jit(do_not_specialize=["N", "H", "W", "S", "chunks"])
def mean_kernel(
    image_ptr,  # [N, H, W, 3] uint8
    params_ptr,  # [B, 16]
    index_ptr,  # [B] int64, the image of each view
    sums_ptr,  # [B, chunks, 3] out
    N, H, W, S, chunks,
    CROP: tl.constexpr, TF: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    chunk, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = params_ptr + view * 16
    if tl.load(row_ptr + 5) != 0:
        image_ptr = _image(image_ptr, index_ptr, view, N, H, W)
        p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        exists = p < S * S
        r, g, b = _pixels(image_ptr, row_ptr, p // S, p % S, exists, H, W, S, CROP, TF)
        before = 1
        for k in range(11, 15):
            op = tl.load(row_ptr + k).to(tl.int32)
            if op == 1:
                before = 0
            if before == 1:
                r, g, b = _operator(op, r, g, b, row_ptr, TF)
        out = sums_ptr + (view * chunks + chunk) * 3
        tl.store(out, tl.sum(tl.where(exists, r, 0.0)))
        tl.store(out + 1, tl.sum(tl.where(exists, g, 0.0)))
        tl.store(out + 2, tl.sum(tl.where(exists, b, 0.0)))


@triton.jit
def _mean(sums_ptr, channel, chunks, S, BLOCK_C: tl.constexpr):
    chunk = tl.arange(0, BLOCK_C)
    return tl.sum(tl.load(sums_ptr + chunk * 3 + channel, mask=chunk < chunks, other=0.0)) / (S * S).to(tl.float32)


@triton.jit
def _product(taps, x, EXACT: tl.constexpr):
    """taps @ x of half-precision halves: each operand is one of 11 bits, with EXACT the sum of two of them."""
    taps_high, x_high = taps.to(tl.float16), x.to(tl.float16)
    out = tl.dot(taps_high, x_high, input_precision="ieee")
    if EXACT:
        out = tl.dot(taps_high, (x - x_high.to(tl.float32)).to(tl.float16), out, input_precision="ieee")
        out = tl.dot((taps - taps_high.to(tl.float32)).to(tl.float16), x_high, out, input_precision="ieee")
    return out


@triton.jit
def _blurred(x, taps, EXACT: tl.constexpr):
    """taps @ x @ taps.T of a tile, transposed."""
    return _product(taps, tl.trans(_product(taps, x, EXACT)), EXACT)


@triton.jit
def _store(out_ptr, at, exists, value, constants_ptr, channel):
    value = (value - tl.load(constants_ptr + channel)) * tl.load(constants_ptr + 3 + channel)
    tl.store(out_ptr + at * 3 + channel, value.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _place(row_ptr, y, x, S):
    return y * S + tl.where(tl.load(row_ptr + 4) != 0, S - 1 - x, x)


#   reads  the image once, where it is blurred also the halos, from the cache;  writes  the view
@triton.jit(do_not_specialize=["N", "H", "W", "S", "chunks", "tiles"])
def view_kernel(
    image_ptr,  # [N, H, W, 3] uint8
    params_ptr,  # [B, 16]
    index_ptr,  # [B] int64, the image of each view
    sums_ptr,  # [B, chunks, 3]
    constants_ptr,  # [6]: mean, then 1 / std
    out_ptr,  # [B, S, S, 3] out
    N, H, W, S, chunks, tiles,
    CROP: tl.constexpr, TF: tl.constexpr, HALO: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = params_ptr + view * 16
    image_ptr = _image(image_ptr, index_ptr, view, N, H, W)
    out_ptr += view * S * S * 3
    sums_ptr += view * chunks * 3
    red, green, blue = 0.0, 0.0, 0.0
    if tl.load(row_ptr + 5) != 0:
        red = _mean(sums_ptr, 0, chunks, S, BLOCK_C)
        green = _mean(sums_ptr, 1, chunks, S, BLOCK_C)
        blue = _mean(sums_ptr, 2, chunks, S, BLOCK_C)
        if not TF:
            gray = _gray(red, green, blue)
            red, green, blue = gray, gray, gray
    sigma = tl.load(row_ptr + 15)
    if (HALO > 0) & (sigma > 0):
        side = BLOCK - 2 * HALO
        across = tl.cdiv(S, side)
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        y, x = tile // across * side + i, tile % across * side + j
        # Beyond the edge lie the reflected pixels, in TF zeros.
        y_in, x_in = tl.abs(y - HALO), tl.abs(x - HALO)
        y_in, x_in = tl.minimum(y_in, 2 * S - 2 - y_in), tl.minimum(x_in, 2 * S - 2 - x_in)
        near = (y_in >= 0) & (x_in >= 0)
        if TF:
            near = (y_in == y - HALO) & (x_in == x - HALO)
        r, g, b = _pixels(image_ptr, row_ptr, y_in, x_in, near, H, W, S, CROP, TF)
        r, g, b = _coloured(r, g, b, row_ptr, red, green, blue, TF)
        if TF:
            r, g, b = tl.where(near, r, 0.0), tl.where(near, g, 0.0), tl.where(near, b, 0.0)
        if not EXACT:
            r, g, b = r.to(tl.float16), g.to(tl.float16), b.to(tl.float16)
        reach = tl.minimum(tl.ceil(4.0 * sigma), HALO)  # as the compiled views of the CPU
        distance = (j - i - HALO).to(tl.float32)
        line = (tl.arange(0, BLOCK) - HALO).to(tl.float32)
        total = tl.sum(tl.where(tl.abs(line) <= reach, tl.exp(-0.5 * (line / sigma) * (line / sigma)), 0.0))
        taps = tl.exp(-0.5 * (distance / sigma) * (distance / sigma)) / total
        taps = tl.where(tl.abs(distance) <= reach, taps, 0.0)
        y, x = tl.trans(y), tl.trans(x)
        exists = (tl.trans(i) < side) & (tl.trans(j) < side) & (y < S) & (x < S)
        at = _place(row_ptr, y, x, S)
        _store(out_ptr, at, exists, _blurred(r, taps, EXACT), constants_ptr, 0)
        _store(out_ptr, at, exists, _blurred(g, taps, EXACT), constants_ptr, 1)
        _store(out_ptr, at, exists, _blurred(b, taps, EXACT), constants_ptr, 2)
    else:
        for start in range(tile * BLOCK_P, S * S, tiles * BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            exists = p < S * S
            y, x = p // S, p % S
            r, g, b = _pixels(image_ptr, row_ptr, y, x, exists, H, W, S, CROP, TF)
            r, g, b = _coloured(r, g, b, row_ptr, red, green, blue, TF)
            at = _place(row_ptr, y, x, S)
            _store(out_ptr, at, exists, r, constants_ptr, 0)
            _store(out_ptr, at, exists, g, constants_ptr, 1)
            _store(out_ptr, at, exists, b, constants_ptr, 2)


def augment(
    images: Tensor, params: Tensor, index: Tensor, size: int, crop: bool, tf: bool, constants: Tensor, halo: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The views, [B, S, S, 3]; arguments as `simclr_fast.data.augment` has checked them, all on one device."""
    B, (N, H, W, _) = len(params), images.shape
    out = torch.empty(B, size, size, 3, dtype=dtype, device=images.device)
    chunks = triton.cdiv(size * size, CHUNK)
    sums = torch.empty(B, chunks, 3, dtype=torch.float32, device=images.device)
    tiles = max(triton.cdiv(size, BLOCK - 2 * halo) ** 2 if halo else 0, chunks)
    with torch.cuda.device_of(images):
        for first in range(0, B, MAX_VIEWS):
            part = slice(first, first + MAX_VIEWS)
            views = len(params[part])
            mean_kernel[(chunks, views)](
                images, params[part], index[part], sums[part], N, H, W, size, chunks,
                num_warps=8, **mean_constants(crop, tf),
            )  # fmt: skip
            view_kernel[(tiles, views)](
                images, params[part], index[part], sums[part], constants, out[part], N, H, W, size, chunks, tiles,
                num_warps=warps(dtype, halo), **view_constants(crop, tf, halo, dtype, chunks),
            )  # fmt: skip
    return out


def mean_constants(crop: bool, tf: bool) -> dict[str, int]:
    """What mean_kernel is compiled for."""
    return {"CROP": crop, "TF": tf, "BLOCK_P": CHUNK}


def view_constants(crop: bool, tf: bool, halo: int, dtype: torch.dtype, chunks: int) -> dict[str, int]:
    """What view_kernel is compiled for."""
    blocks = {"BLOCK": BLOCK, "BLOCK_P": CHUNK, "BLOCK_C": triton.next_power_of_2(chunks)}
    return {"CROP": crop, "TF": tf, "HALO": halo, "EXACT": dtype == torch.float32, **blocks}


def warps(dtype: torch.dtype, halo: int) -> int:
    """Of view_kernel: where half a tile's precision is enough, 16 warps of 128 registers hold it without spills."""
    return 16 if halo and dtype != torch.float32 else 8

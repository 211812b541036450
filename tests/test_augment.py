"""`augment`: every backend against float64, its arguments' rules, and what torch.library asks of an operator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_fast.data import Params, Policy, open_dataset
from simclr_fast.data.augment import HAS_NUMBA, HAS_TRITON, augment
from simclr_fast.data.engines.torchvision_engine import decode

FAST = [
    pytest.param("native", marks=pytest.mark.skipif(not HAS_NUMBA, reason="needs numba")),
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")),
]
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NEUTRAL = [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 2, 3, 0]
FLIP, JITTER, GRAY, SIGMA = 4, 5, 6, 15
OPERATORS = {
    "nothing": {},
    "flip": {FLIP: 1},
    "brightness": {JITTER: 1, 7: 1.7},
    "contrast": {JITTER: 1, 8: 1.8},
    "little contrast": {JITTER: 1, 8: 0.2},
    "saturation": {JITTER: 1, 9: 1.8},
    "hue": {JITTER: 1, 10: 0.17},
    "hue back": {JITTER: 1, 10: -0.2},
    "gray": {GRAY: 1},
    "blur": {SIGMA: 1.3},
    "contrast last": {JITTER: 1, 7: 1.6, 8: 1.5, 9: 1.7, 10: 0.1, 11: 3, 12: 2, 13: 0, 14: 1},
    "contrast first": {JITTER: 1, 7: 0.4, 8: 1.8, 9: 0.3, 10: -0.1, 11: 1, 12: 2, 13: 3, 14: 0},
    "all": {JITTER: 1, 7: 1.2, 8: 1.3, 9: 0.6, 10: 0.05, 11: 2, 12: 1, 13: 0, 14: 3, GRAY: 1, FLIP: 1, SIGMA: 2.0},
}


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Tensor]:
    """uint8 [3, H, W] each, of several sizes."""
    split = open_dataset(str(shared / "data" / "photos-256.tar")).train
    return [decode(split.read(k)) for k in range(len(OPERATORS))]


def rows(*changes: dict[int, float]) -> Tensor:
    out = torch.tensor([NEUTRAL] * len(changes), dtype=torch.float32)
    for row, change in zip(out, changes, strict=True):
        for column, value in change.items():
            row[column] = value
    return out


def drawn(n: int, size: int, shape: tuple[int, int], dialect: str = "torchvision", epoch: int = 0) -> Params:
    return Policy(size, dialect=dialect).draw(1, np.full(n, epoch), np.arange(n), 0, np.tile(shape, (n, 1)))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run, compiled or interpreted


def augmented(images: Tensor, params: Params | Tensor, backend: str, **options) -> Tensor:
    """On the CPU whatever made it."""
    return augment(images.to(DEVICE if backend == "triton" else "cpu"), params, backend=backend, **options).cpu()


def packed(params: Params) -> Tensor:
    return torch.from_numpy(params.packed())


def noise(n: int, height: int, width: int) -> Tensor:
    """Patches of colour and a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 230, (n, height // 5 + 1, width // 5 + 1, 3)).repeat(5, 1).repeat(5, 2)[:, :height, :width]
    return torch.from_numpy((coarse + rng.integers(0, 25, coarse.shape)).astype(np.uint8))


def levels(images: Tensor, params: Params | Tensor, backend: str, dtype=torch.float32, **options) -> float:
    """The largest difference from float64, in 8-bit levels."""
    made = [
        augmented(images, params, b, dtype=d, **UNIT, **options)
        for b, d in ((backend, dtype), ("reference", torch.float64))
    ]
    assert made[0].dtype == dtype
    assert made[0].shape == made[1].shape
    assert made[0].is_contiguous(memory_format=torch.channels_last)
    return 255 * float((made[0].double() - made[1]).abs().max())


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
@pytest.mark.parametrize("backend", FAST)
def test_each_operator_on_real_photographs(photos: list[Tensor], backend: str, dialect: str):
    side = 64 if backend == "triton" else 224
    crops = torch.stack([photo[:, -side:, -side:] for photo in photos if min(photo.shape[1:]) >= side])
    params = rows(*list(OPERATORS.values())[: len(crops)])
    assert len(crops) >= len(OPERATORS) - 1
    crops = crops.permute(0, 2, 3, 1).contiguous()
    for name, k in zip(OPERATORS, range(len(crops)), strict=False):
        off = levels(crops[k : k + 1], params[k : k + 1], backend, dialect=dialect, blur_radius=8)
        assert off < 0.03, name  # the sum of a photograph's pixels in float32


@pytest.mark.parametrize("size", [1, 2, 7, 33, 48, 65])
@pytest.mark.parametrize("backend", FAST)
def test_odd_sides_and_every_tile_of_the_blur(backend: str, size: int):
    images, blur = noise(2, size, size), {SIGMA: 2.0, FLIP: 1}
    assert levels(images, rows(blur, {**blur, **OPERATORS["all"]}), backend, blur_radius=min(8, size - 1)) < 0.01
    assert (
        levels(images, rows(blur, {**blur, **OPERATORS["all"]}), backend, dialect="tf", blur_radius=min(3, size - 1))
        < 0.01
    )


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("shape", "size"), [((32, 32), 32), ((20, 41), 16), ((9, 5), 24), ((1, 40), 8)])
def test_crop_and_resize(backend: str, dialect: str, shape: tuple[int, int], size: int):
    images, params = noise(4, *shape), drawn(4, size, shape, dialect)
    assert levels(images, params, backend, size=size, dialect=dialect) < 0.02


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_as_its_last_digit(backend: str, dtype: torch.dtype):
    images, params = noise(6, 40, 40), drawn(6, 40, (40, 40))
    digit = 255 * torch.finfo(dtype).eps
    # One rounding of the result; the kernel's blur rounds what it multiplies to 11 bits. The interpreter truncates.
    assert levels(images, params, backend, dtype, blur_radius=2) < digit / (1 if backend == "triton" else 2) + 0.2


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_index_chooses_the_images_and_padding_is_never_read(backend: str):
    images = noise(3, 12, 20)
    images[1, 8:], images[1, :, 11:] = 255, 255
    index = torch.tensor([1, 2, 1, 2, 0, 2])[::2]  # not contiguous
    params = Policy(8).draw(0, np.zeros(3, int), np.arange(3), 0, np.array([[8, 11], [8, 11], [12, 20]]))
    made = augmented(images, params, backend, size=8, index=index)
    alone = augmented(images[1:2, :8, :11].contiguous(), packed(params)[:1], backend, size=8)
    torch.testing.assert_close(made[:1], alone, atol=1e-5, rtol=0)
    same = augmented(images[index].contiguous(), params, backend, size=8)
    torch.testing.assert_close(made, same, atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_nothing_gives_nothing(backend: str):
    made = augmented(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), torch.zeros(0, 16), backend)
    assert made.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("backend", FAST)
def test_every_element_is_written_and_the_same_each_time(backend: str):
    images, params = noise(3, 70, 70), drawn(3, 70, (70, 70))
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        first, second = (augmented(images, params, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not first.isnan().any()
    assert torch.equal(first, second)


def test_normalised_by_the_dialect_or_as_told():
    image, params = torch.full((1, 4, 4, 3), 51, dtype=torch.uint8), rows({})
    assert augment(image, params, dialect="tf").unique().tolist() == pytest.approx([0.2])
    red = augment(image, params)[0, 0, 0, 0].item()
    assert red == pytest.approx((0.2 - 0.485) / 0.229, abs=1e-5)
    made = augment(image, params, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))[0, :, 0, 0].tolist()
    assert made == pytest.approx([0.2, 0, -0.05], abs=1e-6)


def test_the_dialect_comes_with_the_parameters():
    images, params = noise(3, 20, 20), drawn(3, 20, (20, 20), "tf")
    made = augment(images, params)
    assert 0 <= made.min() <= made.max() <= 1
    assert torch.equal(made, augment(images, packed(params), dialect="tf"))
    with pytest.raises(ValueError, match="dialect must be left out, or that of params, got 'torchvision'"):
        augment(images, params, dialect="torchvision")


GOOD = {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "params": rows({}, {})}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "images must be a tensor, got ndarray"),
        ({"images": torch.zeros(2, 8, 8, 3)}, "images must be uint8, got torch.float32"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"images must be \[N, H, W, 3\], got \[2, 3, 8, 8\]"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)}, "images must be contiguous"),
        ({"images": torch.zeros(2, 8, 9, 3, dtype=torch.uint8)}, "images must be square without size"),
        ({"params": rows({})}, "params must have a row for each view, got 1 rows and 2 images"),
        ({"params": torch.zeros(2, 15)}, r"params must be Params or \[B, 16\]"),
        ({"params": rows({}, {}).double()}, "params must be float32, got torch.float64"),
        ({"params": rows({}, {7: float("nan")})}, "params must have finite, got in row 1"),
        ({"params": rows({}, {4: 2})}, r"flags \(columns 4-6\) of 0 or 1, got in row 1"),
        ({"params": rows({11: 1}, {})}, "an order of the operators .* got in row 0"),
        ({"params": rows({}, {15: -1})}, "a sigma .* of 0 or more, got in row 1"),
        ({"params": rows({}, {0: 5, 2: 4}), "size": 8}, r"a window .* inside the image \[8, 8\], got in row 1"),
        ({"index": torch.tensor([0, 2])}, r"index must be in 0 to 1, got \(0, 2\)"),
        ({"index": torch.tensor([0.0, 1.0])}, r"index must be int64 \[B\]"),
        ({"size": 0}, "size must be in 1 to 16384, or None, got 0"),
        ({"dialect": "pil"}, "dialect must be one of"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"blur_radius": 8}, "blur_radius must be in 0 to 7 for views of 8 px, got 8"),
        ({"dtype": torch.float64}, "dtype must be one of .* got torch.float64"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, native, reference, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(wrong: dict, message: str):
    arguments = GOOD | wrong
    with pytest.raises(ValueError, match=message):
        augment(arguments.pop("images"), arguments.pop("params"), **arguments)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_operator_is_well_behaved_and_compiles_whole(backend: str):
    images, params = noise(2, 12, 12), packed(drawn(2, 12, (12, 12)))
    arguments = (images, params, torch.arange(2), 12, False, False, [0.0] * 3 + [1.0] * 3, 0, torch.float32, backend)
    torch.library.opcheck(torch.ops.simclr_fast.augment.default, arguments)
    compiled = torch.compile(lambda x, p: augment(x, p, backend=backend) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, params), augment(images, params, backend=backend) + 1)


def test_it_is_public():
    import simclr_fast

    assert simclr_fast.augment is augment


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dialect", "size", "shape"), [("torchvision", 224, None), ("tf", 96, None), ("tf", 32, (40, 36))]
)
def test_on_a_gpu_against_float64(dialect: str, size: int, shape: tuple[int, int] | None, dtype: torch.dtype):
    box = shape or (size, size)
    images, params = noise(24, *box), drawn(24, size, box, dialect)
    options = {"dialect": dialect, "size": size if shape else None, **UNIT}
    truth = augment(images, params, backend="reference", dtype=torch.float64, **options)
    made = augment(images.cuda(), params, dtype=dtype, **options)
    again = augment(images.cuda(), params, dtype=dtype, **options)
    assert torch.equal(made, again)
    off = 255 * (made.cpu().double() - truth).abs().max()
    assert off < (0.03 if dtype == torch.float32 else 255 * torch.finfo(dtype).eps / 2 + 0.2)


@gpu
def test_on_a_gpu_more_than_2_31_elements():
    size, n = 224, 14_500
    images = noise(4, size, size).cuda()[torch.arange(n) % 4].contiguous()
    params = packed(drawn(n, size, (size, size)))
    made = augment(images, params, dtype=torch.float16, **UNIT)
    assert made.numel() > 2**31
    last = augment(images[-3:].contiguous(), params[-3:], dtype=torch.float16, **UNIT)
    assert torch.equal(made[-3:], last)


@gpu
def test_on_a_gpu_it_does_not_wait():
    images, params = noise(4, 32, 32).cuda(), packed(drawn(4, 32, (32, 32))).cuda()
    augment(images, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")

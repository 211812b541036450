"""The compiled views against the original's operators (in float64) and bounds of their own."""

import json
from pathlib import Path

import numpy as np
import pytest

render = pytest.importorskip("simclr_fast.data.render", reason="needs numba")

IDENTITY, UNIT = np.zeros(3, np.float32), np.ones(3, np.float32)


@pytest.fixture(scope="module")
def cases(vectors: Path):
    return json.loads((vectors / "augment_cases.json").read_text()), np.load(vectors / "augment.npz")


def planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.reshape(-1, 3).T, np.float32)


def image(planes: np.ndarray, like: np.ndarray) -> np.ndarray:
    return planes.T.reshape(like.shape)


def row(
    window: tuple[int, ...], flip=0, jitter=0, gray=0, factors=(1, 1, 1, 0), order=(0, 1, 2, 3), sigma=0
) -> np.ndarray:
    return np.array([*window, flip, jitter, gray, *factors, *order, sigma], np.float32)


def view(pixels: np.ndarray, size: int, tf: bool = False, radius: int = 0, **params) -> np.ndarray:
    out = np.full((size, size, 3), np.nan, np.float32)
    params.setdefault("window", (0, 0, *pixels.shape[:2]))
    render.render(out, pixels, row(**params), tf, IDENTITY, UNIT, radius)
    return out


def test_tf_colour_operators(cases):
    listed, arrays = cases
    operators = {
        "brightness_mul": render._brightness,
        "contrast": lambda x, f: render._contrast(x, f, True),
        "saturation": lambda x, f: render._saturation(x, f, True),
        "hue": render._hue,
        "gray": lambda x, _: render._gray(x),
    }
    checked = [case for case in listed["ops"] if case["op"] in operators]
    assert len(checked) == 42
    for case in checked:
        source = arrays[f"img/{case['img']}"]
        x = planes(source)
        operators[case["op"]](x, np.float32(case["value"]))
        np.testing.assert_allclose(image(x, source), arrays[case["key"]].clip(0, 1), atol=2e-6, err_msg=case["key"])


def test_tf_jitter_in_the_given_order(cases):
    listed, arrays = cases
    checked = [case for case in listed["jitter"] if case["impl"] == "v2"]
    assert len(checked) == 8
    for case in checked:
        source = arrays[f"img/{case['img']}"]
        x = planes(source)
        render._jitter(x, row((0, 0, 1, 1), factors=case["values"], order=case["order"]), True)
        np.testing.assert_allclose(image(x, source), arrays[case["key"]], atol=5e-6, err_msg=case["key"])


def test_tf_blur(cases):
    listed, arrays = cases
    for case in listed["blur"]:
        source = arrays[case["image"]]
        x = planes(source)
        if case["taps"] > 1:
            render._blur(x, len(source), np.float32(case["sigma"]), case["taps"] // 2, True)
        np.testing.assert_allclose(image(x, source), arrays[case["key"]], atol=1e-4, err_msg=case["key"])


def test_tf_resize_to_the_edge(cases):
    listed, arrays = cases
    checked = [case for case in listed["resize"] if case["key"].endswith("tf2")]
    assert len(checked) == 6
    for case in checked:
        source, expected = arrays[case["image"]], arrays[case["key"]]
        for axis, length in enumerate(source.shape[:2]):
            first, weights = render._taps(length, case["out"][axis], False)
            dense = np.zeros((case["out"][axis], length + weights.shape[1]))
            for i, start in enumerate(first):
                dense[i, start : start + weights.shape[1]] = weights[i]
            source = np.moveaxis(np.tensordot(dense[:, :length], source, (1, axis)), 0, axis)
        # TensorFlow rounds positions to 1/1024 of a pixel.
        np.testing.assert_allclose(source, expected, atol=1e-3, err_msg=case["key"])


def test_render_reads_its_window_alone():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for tf in (False, True):
        alone = view(np.ascontiguousarray(pixels[5:25, 8:38]), 16, tf)
        np.testing.assert_array_equal(view(pixels, 16, tf, window=(5, 8, 20, 30)), alone)


def test_render_of_the_whole_image_at_its_size_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    np.testing.assert_allclose(view(pixels, 24), pixels / 255, atol=1e-6)
    np.testing.assert_allclose(view(pixels, 24, flip=1), pixels[:, ::-1] / 255, atol=1e-6)


def test_zero_or_reflected_border_of_the_blur():
    white = np.full((20, 20, 3), 255, np.uint8)
    np.testing.assert_allclose(view(white, 20, radius=3, sigma=2), 1, atol=1e-6)
    assert view(white, 20, tf=True, radius=3, sigma=2)[0, 0, 0] < 0.5


def test_mean_and_std():
    out = np.empty((8, 8, 3), np.float32)
    gray = np.full((8, 8, 3), 51, np.uint8)
    render.render(out, gray, row((0, 0, 8, 8)), False, np.float32([0.1, 0.2, 0.3]), np.float32([0.5, 1, 2]), 0)
    np.testing.assert_allclose(out[3, 3], [0.2, 0, -0.05], atol=1e-6)

"""DALI graphs of the contenders: what a user of DALI would write for SimCLR, and its decoder alone."""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, pipeline_def, types

from simclr_fast.data.policy import SIGMAS, Policy


def images_of(files: list[str], device: str) -> Any:
    """uint8 [H, W, 3], each file once in an epoch, in random order."""
    encoded, _ = fn.readers.file(files=files, random_shuffle=True, initial_fill=256)
    return fn.decoders.image(encoded, device="mixed" if device == "cuda" else "cpu", adjust_orientation=False)


def maybe(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def between(low: float, high: float) -> Any:
    return fn.random.uniform(range=[low, high])


def twisted_view(image: Any, policy: Policy, taps: int) -> Any:
    """float32 [3, S, S]."""
    s = policy.jitter_strength
    out = fn.random_resized_crop(
        image, size=[policy.size, policy.size], random_area=[policy.min_area, 1.0], interp_type=types.INTERP_CUBIC
    )
    if maybe(policy.jitter_p):
        out = fn.color_twist(
            out,
            brightness=between(1 - 0.8 * s, 1 + 0.8 * s),
            contrast=between(1 - 0.8 * s, 1 + 0.8 * s),
            saturation=between(1 - 0.8 * s, 1 + 0.8 * s),
            hue=between(-72 * s, 72 * s),
        )
    if maybe(policy.gray_p):
        out = fn.saturation(out, saturation=0.0)
    if policy.blur_p:
        if maybe(policy.blur_p):
            out = fn.gaussian_blur(out, sigma=between(*SIGMAS), window_size=taps)
    return fn.crop_mirror_normalize(
        out,
        mirror=fn.random.coin_flip(probability=policy.flip),
        mean=[255 * value for value in policy.mean],
        std=[255 * value for value in policy.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


@pipeline_def(enable_conditionals=True)
def twisted(files: list[str], policy: Policy, taps: int, device: str) -> Any:
    """Decoded once, two views of each image."""
    image = images_of(files, device)
    return twisted_view(image, policy, taps), twisted_view(image, policy, taps)


@pipeline_def
def decoded(files: list[str], device: str) -> Any:
    """No views."""
    return images_of(files, device)


@pipeline_def
def decoded_bytes(source: Any) -> Any:
    """On the CPU, of encoded images that are given."""
    return fn.decoders.image(fn.external_source(source, batch=True), device="cpu", adjust_orientation=False)

"""Encoders by name: torchvision's and timm's, sizes, what is refused, and timm missing."""

import builtins
import sys

import pytest
import timm
import torch
from torch import nn

from simclr_fast.config import ConfigError
from simclr_fast.models import SMALL_IMAGE, check_arch, encoder


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("timm:test_resnet", 64),
        ("timm:test_vit", 96),  # is built for images of 160 unless told
        ("timm:test_convnext", 64),
        ("timm:mobilenetv3_small_050", 64),  # timm's num_features is 288, its vectors have 1024
        ("timm:pvt_v2_b0", 96),  # its patches of 7 px overlap
        ("timm:levit_128s", 224),  # two classifiers, BatchNorm1d
    ],
)
def test_features_are_vectors_of_num_features(arch, size):
    module = encoder(arch, image_size=size)
    features = module(torch.randn(2, 3, size, size))
    assert features.shape == (2, module.num_features)
    features.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_it_is_timms_own_model():
    torch.manual_seed(3)
    ours = encoder("timm:test_resnet", image_size=64)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(after, torch.rand(1))  # the pass that finds the size draws nothing
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_a_tag_names_weights_and_changes_no_layer():
    plain, tagged = (encoder(arch, image_size=160) for arch in ("timm:test_vit", "timm:test_vit.r160_in1k"))
    assert list(plain.state_dict()) == list(tagged.state_dict())


@pytest.mark.parametrize(("size", "kernel"), [(SMALL_IMAGE, 3), (SMALL_IMAGE + 1, 7)])
def test_small_images_get_the_small_stem(size, kernel):
    module = encoder("resnet18", width=1 / 16, image_size=size)
    assert module.conv1.kernel_size == (kernel, kernel)
    assert module.num_features == 32


@pytest.mark.parametrize(
    ("arch", "width", "message"),
    [
        ("timm:resnet81", 1.0, "behind 'timm:', got 'timm:resnet81'; did you mean timm:resnet18 or "),
        ("timm:resnet18.a1", 1.0, "did you mean .*timm:resnet18.a1_in1k"),
        ("timm:", 1.0, "behind 'timm:', got 'timm:'$"),
        ("timm:hf-hub:timm/resnet18", 1.0, "got 'timm:hf-hub:timm/resnet18'"),
        ("timm:resnet18", 2.0, "width must be 1 for timm's models.*got width=2.0"),
        ("resnet51", 1.0, "arch must be one of resnet8, .*timm:NAME, got 'resnet51'; did you mean 'resnet50'"),
        ("timm", 1.0, "arch must be one of .*got 'timm'; did you mean 'timm:NAME'"),
        ("resnet18", 1 / 128, "width must be .*got width=0.0078125"),
        ("resnet18", float("nan"), "width must be .*got width=nan"),
        ("resnet18", float("inf"), "width must be .*got width=inf"),
    ],
)
def test_names_and_widths_are_checked_without_a_model(monkeypatch, arch, width, message):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
    with pytest.raises(ConfigError, match=message):
        check_arch(arch, width)
    with pytest.raises(ConfigError, match=message):
        encoder(arch, width=width)


def test_good_names_pass_without_a_model(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
    for arch, width in (("resnet8", 0.5), ("resnet152", 4.0), ("timm:resnet18", 1.0), ("timm:resnet18.a1_in1k", 1.0)):
        check_arch(arch, width)


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("timm:vit_tiny_patch16_224", 100, "image_size must be a multiple of 16, the patches of .*got image_size=100"),
        ("timm:test_vit", 100, "arch='timm:test_vit' does not take images of image_size=100: "),
    ],
)
def test_sizes_that_do_not_suit_are_refused(arch, size, message):
    with pytest.raises(ConfigError, match=message):
        encoder(arch, image_size=size)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x, r"arch must give one vector for an image.*output of shape \[2, 3, 64, 64\]"),
        (lambda x: (x, x), "arch must give one vector for an image.*output of type tuple"),
    ],
)
def test_outputs_that_are_no_vectors_are_refused(monkeypatch, output, message):
    class Odd(nn.Module):
        forward = staticmethod(output)

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Odd())
    with pytest.raises(ConfigError, match=message):
        encoder("timm:test_resnet", image_size=64)


def test_without_timm_there_is_one_sentence_and_the_others_work(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    sentence = (
        r"^arch=timm:resnet18 needs timm \(No module named 'timm'\); install it with: pip install 'timm>=1.0.26'$"
    )
    with pytest.raises(ConfigError, match=sentence):
        check_arch("timm:resnet18")
    assert encoder("resnet18", width=1 / 16).num_features == 32

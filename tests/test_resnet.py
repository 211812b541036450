"""ResNet: the official forward pass and sizes, torchvision's state dicts, initial weights, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from simclr_fast.models import ARCHS, projection_head, resnet
from tests.tensorflow_common import vector_weight

# The networks behind the vectors, and how closely z can agree in training: the vectors are float32, and the
# head's BN divides by the spread of as few as 3 rows.
NETS = {
    "r18_cifar_v1head": dict(arch="resnet18", stem="small", layers=2, train_z=1e-4),
    "r50_imagenet_v2head": dict(arch="resnet50", stem="imagenet", layers=3, train_z=1e-2),
    "r50_imagenet_56": dict(arch="resnet50", stem="imagenet", layers=2, train_z=1e-2),
}
# The official sizes whose blocks are not selective kernels and whose depth torchvision has too.
SIZES = [
    (
        f"r{depth}_{width}x_sk0{stem}_proj{layers}",
        f"resnet{depth}",
        width,
        "small" if stem else "imagenet",
        layers,
    )
    for depth, width, stem, head in [
        (18, 1, "", (2, 3)),
        (18, 1, "_cifar", (2, 3)),
        (34, 1, "", (2, 3)),
        (50, 1, "", (2, 3)),
        (50, 1, "_cifar", (2, 3)),
        (50, 2, "", (3,)),
        (50, 3, "", (3,)),
        (50, 4, "", (3,)),
        (101, 1, "", (2, 3)),
        (101, 2, "", (3,)),
        (101, 3, "", (3,)),
        (152, 1, "", (2, 3)),
        (152, 2, "", (3,)),
        (152, 3, "", (3,)),
    ]
    for layers in head
]


def tensorflow_layers(encoder: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The encoder's (convolution, BN) pairs in the order of TensorFlow's numbers: shortcuts come first."""
    pairs = [(encoder.conv1, encoder.bn1)]
    for group in encoder.groups:
        for block in getattr(encoder, group):
            if len(block.downsample):
                pairs.append((block.downsample[0], block.downsample[1]))
            pairs += [
                (getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"bn{i}")
            ]
    return pairs


def tensorflow_names(encoder: nn.Module, head: nn.Sequential) -> dict[str, nn.Module]:
    """Our modules by the official code's scope names."""
    names: dict[str, nn.Module] = {}
    for i, (conv, norm) in enumerate(tensorflow_layers(encoder)):
        suffix = f"_{i}" if i else ""
        names[f"base_model/conv2d{suffix}"] = conv
        names[f"base_model/batch_normalization{suffix}"] = norm
    linears = [module for module in head if isinstance(module, nn.Linear)]
    norms = [module for module in head if isinstance(module, nn.BatchNorm1d)]
    for i, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        names[f"head_contrastive/nl_{i}/dense"] = linear
        names[f"head_contrastive/nl_{i}/batch_normalization"] = norm
    return names


def tensorflow_variables(names: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Our parameters and statistics by the official names; kernels are views in TensorFlow's layout."""
    variables = {}
    for name, module in names.items():
        if isinstance(module, nn.Conv2d):
            variables[f"{name}/kernel"] = module.weight.permute(2, 3, 1, 0)
        elif isinstance(module, nn.Linear):
            variables[f"{name}/kernel"] = module.weight.T
        else:
            variables[f"{name}/gamma"] = module.weight
            variables[f"{name}/moving_mean"] = module.running_mean
            variables[f"{name}/moving_variance"] = module.running_var
            if module.bias is not None:
                variables[f"{name}/beta"] = module.bias
    return variables


@pytest.fixture(scope="module", params=NETS)
def official(request: pytest.FixtureRequest, vectors: Path):
    """Encoder and head in float64 with the vectors' weights, the vectors' arrays and list of variables."""
    net = NETS[request.param]
    encoder = resnet(net["arch"], stem=net["stem"], variant="official").double()
    head = projection_head("nonlinear", encoder.num_features, layers=net["layers"]).double()
    variables = tensorflow_variables(tensorflow_names(encoder, head))
    with torch.no_grad():
        for name, tensor in variables.items():
            tensor.copy_(torch.from_numpy(vector_weight(name, tuple(tensor.shape))))
    with np.load(vectors / "net_forward.npz") as file:
        prefix = request.param + "/"
        arrays = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    listed = json.loads((vectors / "net_vars.json").read_text())[request.param]
    return encoder, head, arrays, listed, net["train_z"]


def error(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest reference value."""
    return float(np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max())


def images(arrays: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).double()


def test_variables_are_the_official_ones(official):
    encoder, head, _, listed, _ = official
    variables = tensorflow_variables(tensorflow_names(encoder, head))
    trainable = {name: list(v.shape) for name, v in variables.items() if "/moving_" not in name}
    assert trainable == {entry["name"]: entry["shape"] for entry in listed["trainable"]}
    assert {name for name in variables if "/moving_" in name} == set(listed["non_trainable"])


def test_eval_forward_is_the_official_one(official):
    encoder, head, arrays, _, _ = official
    encoder.eval(), head.eval()
    with torch.no_grad():
        h = encoder(images(arrays))
        z = head(h)
    assert error(h, arrays["eval/h"]) < 1e-5
    assert error(z, arrays["eval/z"]) < 1e-5


def test_train_forward_and_statistics_are_the_official_ones(official):
    encoder, head, arrays, _, train_z = official
    encoder.train(), head.train()
    inputs = images(arrays)
    with torch.no_grad():
        h = encoder(inputs)
        z = head(h)
    assert error(h, arrays["train/h"]) < 1e-3
    assert error(z, arrays["train/z"]) < train_z

    scopes = "base_model/batch_normalization", "head_contrastive/nl_0/batch_normalization"
    for norm, scope in zip((encoder.bn1, head[1]), scopes, strict=True):
        assert error(norm.running_mean, arrays[f"{scope}/after_one_update/moving_mean"]) < 1e-3
        assert error(norm.running_var, arrays[f"{scope}/after_one_update/moving_variance"]) < 1e-3


@pytest.mark.parametrize(("name", "arch", "width", "stem", "layers"), SIZES, ids=[size[0] for size in SIZES])
def test_parameter_counts_are_the_official_ones(vectors: Path, name, arch, width, stem, layers):
    with torch.device("meta"):
        encoder = resnet(arch, width=width, stem=stem, variant="official")
        head = projection_head("nonlinear", encoder.num_features, layers=layers)
    counts = json.loads((vectors / "param_counts.json").read_text())[name]
    assert sum(p.numel() for p in encoder.parameters()) == counts["base"]
    assert sum(p.numel() for p in head.parameters()) == counts["head"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_state_dicts_and_outputs_are_torchvisions(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=1).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that no wrong order of the norms goes unseen
            nn.init.uniform_(module.weight, 0.5, 1.0), nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5), nn.init.normal_(module.running_mean, std=0.1)
    ours = resnet(arch).eval()
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(weights)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    pictures = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures), theirs(pictures), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ["resnet34", "resnet101", "resnet152"])
def test_deep_state_dicts_have_torchvisions_names_and_shapes(arch):
    with torch.device("meta"):
        ours, theirs = resnet(arch), getattr(torchvision.models, arch)()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_start_as_their_shortcuts(arch):
    with torch.device("meta"):
        names = [name for name, module in resnet(arch).named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert names[0] == "bn1"
    encoder = resnet(arch, width=1 / 16)
    zero = {name for name in names if not encoder.get_submodule(name).weight.any()}
    last = "bn3" if ARCHS[arch].bottleneck else "bn2"
    assert zero == {name for name in names if name.endswith(f".{last}") and ARCHS[arch].zero_scale}
    assert ARCHS[arch].zero_scale == (arch != "resnet8")
    others = [encoder.get_submodule(name) for name in names if name not in zero]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in others)


def test_convolutions_start_truncated_normal():
    torch.manual_seed(0)
    encoder = resnet("resnet18")
    for name in ("conv1", "layer4.0.conv1", "layer4.0.downsample.0"):
        weight = encoder.get_submodule(name).weight
        std = weight[0].numel() ** -0.5
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert 2.0 * std < weight.abs().max().item() <= 2 * std / 0.8796


@pytest.mark.parametrize(
    ("arch", "width", "stem", "features", "side"),
    [
        ("resnet8", 1.0, "imagenet", 256, 16),
        ("resnet8", 0.5, "small", 128, 16),
        ("resnet18", 0.25, "small", 128, 32),
        ("resnet18", 0.25, "imagenet", 128, 8),
        ("resnet50", 1 / 64, "small", 32, 32),
        ("resnet18", 0.3, "small", 19 * 8, 32),
    ],
)
def test_width_and_stem(arch, width, stem, features, side):
    encoder = resnet(arch, width=width, stem=stem)
    sides = []
    encoder.layer1.register_forward_hook(lambda module, args, output: sides.append(output.shape[-1]))
    h = encoder(torch.randn(2, 3, 32, 32))
    assert encoder.num_features == features
    assert h.shape == (2, features)
    assert sides == [side]


def test_width_reaches_every_layer():
    with torch.device("meta"):
        narrow, wide = resnet("resnet50"), resnet("resnet50", width=2)
    for (name, one), two in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        inputs = [one.shape[1] * 2] if one.ndim == 4 and name != "conv1.weight" else list(one.shape[1:2])
        assert list(two.shape[:2]) == [one.shape[0] * 2, *inputs], name


@pytest.mark.parametrize("size", [9, 10])
def test_official_pool_pads_as_tensorflow(size):
    pool = resnet("resnet18", width=1 / 64, variant="official").maxpool
    rising = torch.arange(size * 1.0).expand(1, 1, size, size)
    # SAME: even sizes have windows 0-2, 2-4, ..., cut at the end; odd ones are centred on 0, 2, ...
    last = [min(i + (2 if size % 2 == 0 else 1), size - 1) for i in range(0, size, 2)]
    assert pool(rising)[0, 0, 0].tolist() == last


def test_channels_last_gives_the_same_values_and_keeps_the_layout():
    torch.manual_seed(0)
    encoder, pictures = resnet("resnet18", width=0.25).eval(), torch.randn(2, 3, 64, 64)
    expected = encoder(pictures)
    encoder = encoder.to(memory_format=torch.channels_last)
    layouts = []
    encoder.layer4.register_forward_hook(
        lambda module, args, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    actual = encoder(pictures.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert layouts == [True]


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    encoder = resnet("resnet8", width=0.25)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    encoder(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(arch="resnet51"), "arch must be one of resnet8, .*got 'resnet51'; did you mean 'resnet50'"),
        (dict(arch="resnet18", stem="smal"), "stem must be .*did you mean 'small'"),
        (dict(arch="resnet8", stem="smal"), "stem must be .*did you mean 'small'"),
        (dict(arch="resnet18", variant="oficial"), "variant must be .*did you mean 'official'"),
        (dict(arch="resnet18", width=0.0), "width must be .*got width=0.0"),
        (dict(arch="resnet18", width=-1.0), "width must be .*got width=-1.0"),
        (dict(arch="resnet18", width=0.005), "width must be .*got width=0.005"),
        (dict(arch="resnet18", width=float("nan")), "width must be .*got width=nan"),
        (dict(arch="resnet18", width=float("inf")), "width must be .*got width=inf"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**arguments)

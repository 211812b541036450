"""evaluate finetune: what is trained, on which images, several processes, the file it saves, worst inputs."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from simclr_fast import checkpoint, evaluate, load
from simclr_fast.cli import saved_settings
from simclr_fast.config import ConfigError
from simclr_fast.evaluation import finetune
from simclr_fast.evaluation.finetune import Classifier
from simclr_fast.evaluation.supervised import Frozen, Recipe, batch_for, crops, fit, only
from simclr_fast.models.batchnorm import BatchNorm
from simclr_fast.pretrained import Encoder
from simclr_fast.pretrained import Recipe as EncoderRecipe
from tests.processes import environment
from tests.test_linear import colours, evaluated, folder_of, job_of, own_cache, trained
from tests.train_common import ROOT

__all__ = ["colours", "evaluated", "own_cache", "trained"]  # fixtures are used by their names
CPU = ("--gpus", "0", "--precision", "fp32")


def tuned(evaluated, *flags):
    return evaluated(*CPU, *flags, protocol="finetune")


def test_colours_are_told_apart(evaluated, tmp_path):
    status, found, out, err = tuned(evaluated, "--labels", "50", "--epochs", "20", "--lr", "0.5")
    assert status == 0, err
    assert found["figures"]["top-1"] == 1.0
    assert found["counts"] == {"training images": 18, "test images": 12, "batch": 18, "steps": 21}
    assert "fine-tuning on 18 images, 20 epochs: 21 steps of 18 images, lr 0.03516" in out
    assert found["notes"][0].startswith("trained on 50 % of the labels, of ")
    listing = next((tmp_path / "out").glob("subset-*.txt"))
    assert re.fullmatch(r"subset-colours\d+-[0-9a-f]{8}-50pc-seed0\.txt", listing.name)
    names = listing.read_text().splitlines()
    assert sorted(name.split("/")[-2] for name in names) == ["blue"] * 6 + ["green"] * 6 + ["red"] * 6


def test_the_list_is_that_of_the_seed_and_can_be_given(evaluated, tmp_path):
    flags = ("--epochs", "1", "--labels", "25")
    tuned(evaluated, *flags)
    path = next((tmp_path / "out").glob("subset-*.txt"))
    first = path.read_text()
    _, found, _, _ = tuned(evaluated, *flags)
    assert path.read_text() == first
    tuned(evaluated, *flags, "--seed", "1")
    assert (tmp_path / "out" / path.name.replace("seed0", "seed1")).read_text() != first
    _, given, _, err = tuned(evaluated, "--epochs", "1", "--subset", str(path))
    assert given is not None, err
    assert given["counts"]["training images"] == len(first.splitlines()) == 9
    path.write_text("\n".join(first.splitlines()[:-1]))
    _, other, _, _ = tuned(evaluated, "--epochs", "1", "--subset", str(path))
    assert other["name"] != given["name"]  # another list, though of the same name
    assert other["settings"]["subset"].startswith(f"{path} (")


def test_lists_of_other_images_of_the_same_name_stay(evaluated, tmp_path):
    for place, counts in (("here", (6, 6, 6)), ("there", (8, 8, 8))):
        data = folder_of(tmp_path / place / "data", counts, 2)
        status, _, _, err = tuned(evaluated, "--data", str(data), "--labels", "50", "--epochs", "1")
        assert status == 0, err
    lists = sorted(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("subset-data-*.txt"))
    assert lists == [9, 12]


@pytest.mark.parametrize(("labels", "epochs"), [("8.4", 30), ("100", 30)])
def test_the_paper_s_epochs(labels, epochs, evaluated):
    _, found, out, err = tuned(evaluated, "--labels", labels)
    assert f"{epochs} epochs" in out, err
    assert found["settings"]["lr"] == 0.05


def test_one_image_a_class(evaluated):
    for flags in ((), ("--from-layer", "1")):
        status, found, _, err = tuned(evaluated, "--labels", "8.4", "--epochs", "3", *flags)
        assert status == 0, err
        assert found["counts"]["training images"] == 3


def updated(trained, layers):
    """Tensors of a classifier before and after a few steps."""
    job = job_of(trained, settings=finetune.Settings)
    train, _ = job.labelled()
    model, digest = Classifier(job.encoder, layers, 3), job.encoder.digest()
    torch.nn.init.normal_(model.classifier.weight)  # zeros give the first step no gradient below
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, train, Recipe(batch=12, steps=2, lr=0.1), job)
    assert job.encoder.digest() == digest
    return before, model.state_dict()


def test_every_weight_and_statistic_moves_and_the_job_s_encoder_does_not(trained):
    for layers in (0, 1):
        before, after = updated(trained, layers)
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert all(name.startswith("encoder.head.") for name in still)  # what the classifier does not stand on
        assert any(name.startswith("encoder.head.3") for name in still)
        assert ("encoder.head.0.weight" in still) == (layers == 0)
        assert any("running_mean" in name for name in before.keys() - still)


def test_the_classifier_stands_on_the_first_layer_after_its_relu():
    torch.manual_seed(0)
    encoder = Encoder(EncoderRecipe(arch="resnet8", width=0.125, image_size=16, head="nonlinear"), "new").eval()
    model = Classifier(encoder, 1, 2).eval()
    h = torch.randn(5, encoder.num_features)
    assert torch.equal(model.top(h), encoder.head[2](encoder.head[1](encoder.head[0](h))))
    assert (model.top(h) >= 0).all()
    assert (Classifier(encoder, 0, 2).top(h) == h).all()
    assert not model.classifier.weight.any()


def test_batchnorm_is_this_project_s_in_train_mode_over_the_batch(trained):
    job = job_of(trained, settings=finetune.Settings)
    train, _ = job.labelled()
    model, modes = Classifier(job.encoder, 1, 3), set()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    norms[0].register_forward_hook(lambda module, *_: modes.add(module.training))
    fit(model, train, Recipe(batch=12, steps=1, lr=0.1), job)
    assert modes == {True}
    assert len({id(module.scope) for module in norms}) == 1
    assert not any(module.training for module in model.modules())


def test_weight_decay_leaves_batchnorm_out(trained):
    """With a rate that moves weights by decay alone: the classifier of zeros gives no gradient below it."""
    job = job_of(trained, settings=finetune.Settings)
    train, _ = job.labelled()
    model = Classifier(job.encoder, 0, 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, train, Recipe(batch=12, steps=1, lr=0.1, weight_decay=0.5), job)
    norms = {name for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    for name, p in model.named_parameters():
        if not p.requires_grad or name.startswith("classifier"):
            continue
        decayed = 1 if name.rpartition(".")[0] in norms else 1 - 0.1 * 0.5 * 1.9  # Nesterov's first step is 1 + 0.9
        torch.testing.assert_close(p.detach(), before[name].detach() * decayed, msg=name)


def test_two_processes_learn_what_one_does(trained, evaluated, tmp_path):
    flags = ("--labels", "34", "--epochs", "2", "--from-layer", "1", "--lr", "2")
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    status, _, _, err = tuned(evaluated, *flags, "--save", str(one))
    assert status == 0, err
    done = subprocess.run(
        [sys.executable, "-m", "simclr_fast.evaluate", "finetune", "--checkpoint", str(trained), *CPU, *flags,
         "--ranks", "2", "--save", str(two), "--out", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(XDG_CACHE_HOME=tmp_path / "cache2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, other, start = (checkpoint.read(path)["method"] for path in (one, two, trained / "checkpoints" / "last.pt"))
    for name, tensor in first.items():
        step = (tensor - start[name]).double().norm()
        assert (tensor - other[name]).double().norm() <= 1e-3 * step + 1e-6, name
    assert any((first[name] - start[name]).norm() > 1e-3 for name in first)


def test_what_is_saved_is_loaded_and_evaluated(trained, evaluated, tmp_path):
    path = tmp_path / "tuned.pt"
    status, found, _, err = tuned(evaluated, "--labels", "100", "--epochs", "2", "--save", str(path))
    assert status == 0, err
    encoder = load(path)
    assert encoder.digest() != load(trained).digest()
    assert not encoder.training
    state = checkpoint.read(path)
    assert state["classes"] == ["blue", "green", "red"]
    assert state["classifier"]["weight"].shape == (3, encoder.num_features)
    assert found["weights"] == load(trained).digest()  # the result is of the encoder that was given
    assert [one.name for one in tmp_path.iterdir() if "tuned" in one.name] == ["tuned.pt"]
    data = saved_settings(trained / "config.json")["data"]
    arguments = ["knn", "--checkpoint", str(path), "--data", data, *CPU, "--out", str(tmp_path / "knn")]
    assert evaluate.main(arguments) == 0


def test_a_target_that_cannot_be_is_said_before_the_work(evaluated, tmp_path, monkeypatch):
    path = tmp_path / "tuned.pt"
    path.write_text("mine")
    monkeypatch.setattr(finetune, "fit", None)
    status, found, _, err = tuned(evaluated, "--labels", "100", "--save", str(path))
    assert (status, found, path.read_text()) == (2, None, "mine")
    assert f"error: save must not exist yet, got save={path}; --overwrite replaces it" in err
    status, _, _, err = tuned(evaluated, "--labels", "100", "--save", str(path / "below.pt"))
    assert status == 2
    assert f"save must be a file that can be written, got save={path}/below.pt: " in err


def test_a_file_that_is_to_be_replaced_and_a_disk_that_fails_at_the_end(evaluated, tmp_path, monkeypatch):
    path, flags = tmp_path / "tuned.pt", ("--labels", "100", "--epochs", "1", "--overwrite")
    path.write_text("mine")
    flags = (*flags, "--save", str(path))

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_whole", full)
        status, _, out, err = tuned(evaluated, *flags)
    assert (status, path.read_text()) == (2, "mine")
    assert "top-1 " in out
    assert f"got save={path}: No space left on device" in err
    status, found, _, err = tuned(evaluated, *flags)
    assert status == 0, err
    assert checkpoint.read(path)["classes"] == ["blue", "green", "red"]
    assert "save" not in found["settings"]


def test_logits_are_float32_in_training_as_in_the_test(trained):
    """Also in bf16, which rounds the features alone."""
    encoder = load(trained)
    model, images = Classifier(encoder, 1, 3).eval(), torch.randn(4, 3, 16, 16)
    torch.nn.init.normal_(model.classifier.weight)
    frozen = Frozen(copy.deepcopy(encoder.network), model.classifier).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = encoder(images).float()
        both = model(images), frozen(images)
    with torch.no_grad():
        wanted = model.classifier(model.top(h)), model.classifier(h)
    assert not torch.equal(wanted[1], wanted[1].bfloat16().float())
    for got, want in zip(both, wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_nothing_is_decoded_but_the_images_of_the_list(trained):
    job = job_of(trained, settings=finetune.Settings)
    train, _ = job.labelled()
    rows = np.array([3, 20, 35])
    split = only(train.take(rows))
    assert list(split.names) == [train.split.names[row] for row in rows]
    assert split.labels.tolist() == [0, 1, 2]
    assert np.array_equal(split.read(1), train.split.read(20))
    assert only(train) is train.split


def test_batches():
    assert batch_for(None, 1000, 1) == 256
    assert batch_for(None, 10, 1) == 10
    assert batch_for(None, 10, 3) == 9
    assert batch_for(None, 2, 4) == 4
    assert batch_for(4096, 10, 4) == 4096
    with pytest.raises(
        ConfigError, match="batch must be divisible by the number of processes, got batch=6, processes=4"
    ):
        batch_for(6, 10, 4)


def test_the_official_steps_and_rate():
    """google-research/simclr: 1 % of ImageNet, 60 epochs at 4096; the rate of appendix B.5."""
    recipe = Recipe.of_epochs(4096, 12_811, 60, 0.05, 0.0)
    assert (recipe.steps, recipe.lr) == (12_811 * 60 // 4096 + 1, 0.8)


def test_views_are_crops_and_flips_alone(trained):
    policy = crops(load(trained).policy)
    assert (policy.jitter_strength, policy.gray_p, policy.blur_p, policy.flip) == (0, 0, 0, 0.5)
    assert policy.size == 16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--labels", "5"), "labels must leave an image for each of the 3 classes, got labels=5, which is 2 of 36"),
        (
            ("--labels", "50", "--from-layer", "2"),
            "from_layer must be at most 1, the hidden layers of the checkpoint's",
        ),
        (("--subset", "none.txt"), "subset must be a text file with an image's name on each line, got none.txt"),
    ],
)
def test_what_cannot_be_trained(evaluated, flags, words):
    status, found, _, err = tuned(evaluated, *flags)
    assert (status, found) == (2, None)
    assert words in err


def test_a_list_that_lacks_a_class(evaluated, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("red/0.png\ngreen/1.png\n")
    status, _, _, err = tuned(evaluated, "--subset", str(path))
    assert status == 2
    assert "has none of 1 (blue)" in err


def test_classes_of_unequal_size(evaluated, tmp_path):
    data = folder_of(tmp_path / "data", (10, 1, 4), 2)
    status, found, _, err = tuned(evaluated, "--data", str(data), "--labels", "60", "--epochs", "1")
    assert status == 0, err
    names = next((tmp_path / "out").glob("subset-data-*.txt")).read_text()
    assert [names.count(f"{colour}/") for colour in ("red", "green", "blue")] == [4, 1, 4]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--labels", "0"), "labels must be per cent, in (0, 100]"),
        (("--labels", "101"), "labels must be per cent, in (0, 100]"),
        (("--labels", "1", "--subset", "x.txt"), "labels must be left out with --subset"),
        (("--batch", "1"), "batch must be at least 2, for BatchNorm"),
        (("--from-layer", "-1"), "from_layer must be 0 or more"),
        (("--save", "x.npz"), "save must be a file whose name ends with .pt"),
    ],
)
def test_settings_that_cannot_be(trained, capsys, flags, words):
    with pytest.raises(SystemExit):
        evaluate.main(["finetune", "--checkpoint", str(trained), *flags])
    assert words in " ".join(capsys.readouterr().err.split())

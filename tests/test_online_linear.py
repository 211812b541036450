"""The linear classifier beside pretraining: what it learns, that the encoder never feels it, ranks, chunks, resume."""

import shutil
import signal
import subprocess

import pytest
import torch
from torch import nn

from simclr_fast import checkpoint
from simclr_fast import run as run_module
from simclr_fast.config import Config, ConfigError
from simclr_fast.record import read_metrics
from simclr_fast.training.online import RATE, OnlineLinear
from tests.processes import environment
from tests.test_step import CFG, built, parts, views
from tests.train_common import assert_same_bits, command, images, jpeg, run, untimed  # noqa: F401

D, K = 8, 3


def separated(rows, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (rows,), generator=generator)
    h = torch.eye(K, D)[labels] + 0.05 * torch.randn(rows, D, generator=generator)
    return scale * h + 3 * scale, labels


def learnt(steps=150, scale=1.0, features=separated):
    encoder = nn.Identity()
    encoder.register_parameter("p", nn.Parameter(torch.zeros(1)))
    online = OnlineLinear(encoder, D, K)
    for step in range(steps):
        h, labels = features(32, step, scale)
        online.expect(labels)
        encoder(torch.cat([h, h]))
        if step == steps - 20:
            online.accuracy()
        online.update()
    return online


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_separable_features_are_learnt_at_any_scale(scale):
    online = learnt(scale=scale)
    assert online.accuracy() == 1.0
    assert online.hits.tolist() == [0, 0]


def test_labels_that_mean_nothing_stay_at_chance():
    def noise(rows, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, D, generator=generator), torch.randint(K, (rows,), generator=generator)

    assert abs(learnt(features=noise).accuracy() - 1 / K) < 4 * (1 / K * (1 - 1 / K) / (20 * 32)) ** 0.5


def test_the_rate_is_stable_for_the_most_curved_features_there_are():
    """All standardised features alike: second moments of one direction, d."""

    def alike(rows, seed, scale):
        h = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, D)
        return h, (h[:, 0] > 0).long()

    online = learnt(steps=400, features=alike)
    assert online.weight.isfinite().all()
    assert online.accuracy() > 0.95


def test_first_step_is_that_of_softmax_regression_on_standardised_features():
    encoder = nn.Identity()
    encoder.register_parameter("p", nn.Parameter(torch.zeros(1)))
    online, (h, labels) = OnlineLinear(encoder, D, K), separated(16, 0)
    for _ in range(2):  # the first batch is measured alone
        online.expect(labels)
        encoder(torch.cat([h, h]))
        online.update()
    x = (h - h.mean(0)) / h.var(0, correction=0).add(1e-4 * h.var(0, correction=0).mean()).sqrt()
    layer = nn.Linear(D, K)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    nn.functional.cross_entropy(layer(x), labels).backward()
    expected = -RATE / D * torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    torch.testing.assert_close(online.weight, expected, rtol=1e-3, atol=1e-5)


def test_images_without_labels_are_left_out():
    encoder = nn.Identity()
    encoder.register_parameter("p", nn.Parameter(torch.zeros(1)))
    some, all_ = OnlineLinear(encoder, D, K), OnlineLinear(encoder, D, K)
    h, labels = separated(12, 0)
    labels[6:] = -1
    for _ in range(3):
        some.expect(labels)
        all_.expect(labels[:6])
        h = h.roll(1, 1)
        encoder(torch.cat([h, h]))
        all_._features = [torch.cat([h[:6], h[:6]])]
        all_.moments, all_.seen = some.moments, some.seen  # which take all features
        some.update()
        all_.update()
    torch.testing.assert_close(some.weight, all_.weight)
    assert some.hits.tolist() == all_.hits.tolist()


def test_features_that_are_not_finite_change_nothing():
    online = learnt(steps=5)
    before = {name: tensor.clone() for name, tensor in online.state_dict().items()}
    h, labels = separated(8, 1)
    h[3, 2] = torch.nan
    online.expect(labels)
    online._features = [torch.cat([h, h])]
    online.update()
    for name, tensor in online.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("chunks", "bn_images"), [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_each_feature_meets_its_own_label_in_chunks_and_blocks(chunks, bn_images):
    """The first pixel says the class; the encoder hands it on."""
    method, step = built(accumulate=chunks, bn_images=bn_images)
    online = OnlineLinear(method.encoder, method.encoder.num_features, CFG.batch, pieces=step.pieces)
    marked, labels = views(CFG.batch).clone(), torch.arange(CFG.batch)
    marked[:, :, 0, 0, 0] = labels.double()
    method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0, 0, 0]))
    seen = []
    for chunk in labels.chunk(chunks):
        online.expect(chunk)
    step(1, parts(marked, chunks))
    assert torch.equal(torch.cat(seen)[: 2 * CFG.batch].long(), torch.cat(online._labels))
    assert sum(map(len, online._features)) == 2 * CFG.batch
    online.update()


def test_the_encoder_never_feels_it_and_a_run_goes_on_with_it(images, tmp_path):  # noqa: F811
    flags = ("--checkpoint-minutes", "1000")
    assert run(images, tmp_path / "without", *flags) == 0
    assert run(images, tmp_path / "with", *flags, "--online-linear") == 0
    assert_same_bits(tmp_path / "without", tmp_path / "with")
    accuracies = [record["online_top1"] for record in read_metrics(tmp_path / "with")]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert "online_top1" not in read_metrics(tmp_path / "without")[-1]
    state = checkpoint.read(tmp_path / "with" / "checkpoints" / "last.pt")
    assert state["online"]["weight"].abs().max() > 0


def test_resume_is_exact(images, tmp_path, monkeypatch):  # noqa: F811
    assert run(images, tmp_path / "whole", "--online-linear") == 0
    original = run_module.OnlineLinear.update
    calls = []

    def failing(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.OnlineLinear, "update", failing)
        assert run(images, tmp_path / "cut", "--online-linear", "--checkpoint-minutes", "1e-9") == 130
    assert run(images, tmp_path / "cut", "--online-linear", "--checkpoint-minutes", "1e-9") == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (checkpoint.read(tmp_path / name / "checkpoints" / "last.pt")["online"] for name in ("whole", "cut"))
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


@pytest.mark.parametrize("earlier", [False, True])
def test_other_classes_begin_anew(images, tmp_path, monkeypatch, capsys, earlier):  # noqa: F811
    own, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "run"
    asked = iter(range(1, 100))
    monkeypatch.setattr(run_module.Interrupt, "wanted", lambda *_: (signal.SIGTERM if next(asked) == 4 else 0, False))
    assert run(own, out, "--online-linear") == 75
    monkeypatch.undo()
    for part in ("train", "test"):
        (own / part / "cat").mkdir()
        for number in range(5):
            (own / part / "cat" / f"{number}.jpg").write_bytes(jpeg(5000 + number))
    last = out / "checkpoints" / "last.pt"
    if earlier:  # a version that did not write them
        torch.save({name: value for name, value in checkpoint.read(last).items() if name != "classes"}, last)
    capsys.readouterr()
    assert run(own, out, "--online-linear", "--accept-changed-data") == 0
    assert "the classes are others than before: --online-linear begins anew" in capsys.readouterr().out
    state = checkpoint.read(out / "checkpoints" / "last.pt")
    assert len(state["online"]["weight"]) == len(state["classes"]) == 3


def test_two_ranks_learn_what_one_does(images, tmp_path):  # noqa: F811
    assert run(images, tmp_path / "one", "--online-linear") == 0
    done = subprocess.run(
        command(images, tmp_path / "two", "--online-linear", "--ranks", "2"),
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (checkpoint.read(tmp_path / name / "checkpoints" / "last.pt")["online"] for name in ("one", "two"))
    assert one["hits"][1] == two["hits"][1]
    torch.testing.assert_close(one["weight"], two["weight"], rtol=2e-2, atol=2e-3)


def test_data_without_labels_are_refused(tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    assert run(folder, tmp_path / "run", "--online-linear") == 2
    assert "online_linear needs data with labels (class folders), and" in capsys.readouterr().err


def test_knn_every_so_many_epochs(images, tmp_path):  # noqa: F811
    assert run(images, tmp_path / "run", "--knn-every", "2") == 0
    scored = [record["epoch"] for record in read_metrics(tmp_path / "run") if "knn_top1" in record]
    assert sorted(set(scored)) == [2.0, 3.0]


def test_epochs_that_are_evaluated():
    assert Config(epochs=7, knn_every=3).evaluated() == {3, 6, 7}
    assert Config(epochs=4, knn_every=9).evaluated() == {4}
    assert Config(epochs=10).evaluated() == {2, 4, 6, 8, 10}
    with pytest.raises(ConfigError, match="evaluations must be left out with --knn-every, got evaluations=3"):
        Config(knn_every=2, evaluations=3)
    with pytest.raises(ConfigError, match="knn_every must be positive, got knn_every=0"):
        Config(knn_every=0)

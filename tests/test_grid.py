"""Fine-tuning over a grid: what is chosen, what diverges, and a search that goes on where it was."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from simclr_fast.evaluation import finetune, grid, transfer
from simclr_fast.evaluation.benchmarks import BENCHMARKS, Task, open_task
from simclr_fast.record import RunError
from tests.transfer_common import checkpoint, job_of, own_cache_and_fewer_values
from tests.transfer_miniatures import class_folders

__all__ = ["checkpoint", "own_cache_and_fewer_values"]  # fixtures are used by their names


def opened(folder: Path) -> Task:
    task = open_task(BENCHMARKS["dtd"], folder)
    assert task is not None
    return task


def test_the_best_pair_in_validation_is_trained_again_on_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 4})
    task = opened(tmp_path)
    settings = transfer.Settings(checkpoint=str(checkpoint), gpus=0, workers=1, precision="fp32")
    trained, fit = [], grid.fit
    monkeypatch.setattr(grid, "fit", lambda model, *a, **k: trained.append((len(a[0]), a[1])) or fit(model, *a, **k))
    given = iter([0.2, 0.9, 0.5, 0.9])
    logits, best, tried = grid.search(
        task, job_of(settings), lambda scores, targets: next(given),
        lrs=(0.01, 0.1), decays=(0.0, 1e-4), steps=1, batch=None, scores=tmp_path / "scores",
    )  # fmt: skip
    assert logits.shape == (12, 3)
    assert (best.lr, best.decay, best.score) == (0.01, 1e-4, 0.9)
    assert len(tried) == 4
    assert [count for count, _ in trained] == [9, 9, 9, 9, 15]
    assert trained[-1][1].weight_decay == pytest.approx(1e-2)
    assert [recipe.batch for _, recipe in trained] == [9, 9, 9, 9, 15]


def test_all_ranks_train_again_with_the_main_one_s_best_pair(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    task = opened(tmp_path)
    job = job_of(transfer.Settings(checkpoint=str(checkpoint), gpus=0, workers=1, precision="fp32"))
    trained, fit, from_main = [], grid.fit, job.ranks.from_main

    def said(compute, **how):
        found = from_main(compute, **how)
        return found[::-1] if isinstance(found, list) else found

    monkeypatch.setattr(job.ranks, "from_main", said)
    monkeypatch.setattr(grid, "fit", lambda model, *a, **k: trained.append(a[1].lr) or fit(model, *a, **k))
    grid.search(
        task, job, lambda scores, targets: 0.5, lrs=(0.01, 0.03), decays=(0.0,), steps=1, batch=None,
        scores=tmp_path / "scores",
    )  # fmt: skip
    assert trained == [0.01, 0.03, 0.03]


def test_fine_tuning_leaves_the_encoder_alone_and_survives_a_pair_that_diverges(checkpoint: Path, tmp_path: Path):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    settings = transfer.Settings(
        checkpoint=str(checkpoint), data=str(tmp_path), gpus=0, workers=1, precision="fp32", mode="finetune", steps=3,
        lrs=(3e38, 0.01), decays=(0.0,),
    )  # fmt: skip
    job = job_of(settings)
    before = job.encoder.digest()
    result = transfer.run(settings, job)
    assert job.encoder.digest() == before
    assert any("1 of 2 trainings diverged" in note for note in result.notes)
    settings = dataclasses.replace(settings, lrs=(3e38,))
    with pytest.raises(RunError, match=r"lrs must be lower: each of the 1 trainings on DTD diverged, got lrs=\[3e\+38"):
        transfer.run(settings, job_of(settings))


def test_a_search_that_was_interrupted_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    settings = transfer.Settings(
        checkpoint=str(checkpoint), data=str(tmp_path), gpus=0, workers=1, precision="fp32", mode="finetune", steps=2,
        lrs=(3e38, 0.01, 0.03), decays=(0.0,), out=str(tmp_path / "out"),
    )  # fmt: skip
    trained, fit, last = [], grid.fit, 0.03

    def until_killed(model, *arguments, **options):
        if arguments[1].lr == last:
            raise KeyboardInterrupt
        trained.append(arguments[1].lr)
        return fit(model, *arguments, **options)

    monkeypatch.setattr(grid, "fit", until_killed)
    with pytest.raises(KeyboardInterrupt):
        transfer.run(settings, job_of(settings))
    assert trained == [3e38, 0.01]
    last, said = None, []
    found = transfer.run(settings, job_of(settings, said))
    (file,) = (tmp_path / "out").glob("*.jsonl")
    assert trained[2] == 0.03
    assert len(trained) == 4
    score = json.loads(file.read_text().splitlines()[1])[2]
    assert f"DTD, 1 of 3, lr 3.0e+38, decay 0.0e+00: diverged, says {file}" in said
    assert f"DTD, 2 of 3, lr 1.0e-02, decay 0.0e+00: {score:.2%} in validation, says {file}" in said
    assert any("1 of 3 trainings diverged" in note for note in found.notes)

    trained.clear()
    transfer.run(dataclasses.replace(settings, steps=3), job_of(dataclasses.replace(settings, steps=3)))
    assert len(trained) == 4
    for other in (tmp_path / "out").glob("*.jsonl"):
        other.write_text("[0.01, 0.0")
    with pytest.raises(RunError, match=f"{file.name} cannot be read, without which the search begins anew"):
        transfer.run(settings, job_of(settings))


def test_the_scores_of_other_weights_or_images_are_in_another_file(checkpoint: Path, tmp_path: Path):
    settings = transfer.Settings(checkpoint=str(checkpoint), gpus=0, workers=1, mode="finetune", out=str(tmp_path))

    for images in (2, 3):
        class_folders(tmp_path / f"{images}" / "dtd", {"train": images, "val": 2, "test": 2})

    def file(images: int = 2, **changes) -> Path:
        task = opened(tmp_path / f"{images}")
        return transfer.scores_file(task, job_of(dataclasses.replace(settings, **changes)))

    assert file() == file(lrs=(0.5,), sets=("dtd",), ranks=1)
    changed = [file(), file(3), file(steps=7), file(seed=1), file(batch=4)]
    assert len(set(changed)) == len(changed)


def test_statistics_of_batchnorm_keep_more_in_long_epochs():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3))
    for steps, momentum in ((0.5, 0.1), (50, 0.1), (1000, 0.01)):
        grid.set_momentum(model, steps)
        assert model[0].momentum == pytest.approx(momentum)


def test_the_loss_of_several_classes_is_the_sum_of_those_that_count():
    logits = torch.tensor([[2.0, -1.0, 5.0], [0.0, 3.0, 1.0]])
    targets = torch.tensor([[1, 0, -1], [0, 1, 0]])
    each = -torch.nn.functional.logsigmoid(torch.tensor([2.0, 1.0, 0.0, 3.0, -1.0]))
    torch.testing.assert_close(grid.several(logits, targets), each.sum() / 2)


def test_the_papers_grid():
    assert grid.LRS == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1], rel=1e-3)
    assert grid.DECAYS == pytest.approx([0, 1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3], rel=1e-3)


def test_searches_at_other_pairs_keep_each_other_s_scores(tmp_path: Path):
    file = tmp_path / "deep" / "scores"
    grid._write(file, {(0.01, 0.0): 0.5, (0.02, 0.0): 0.25})
    grid._write(file, {(0.03, 0.0): float("nan"), (0.02, 0.0): 0.75})
    found = grid._read(file)
    assert found.pop((0.03, 0.0)) != 0
    assert found == {(0.01, 0.0): 0.5, (0.02, 0.0): 0.75}


def test_the_next_best_pair_where_the_best_diverges_in_the_end(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    task = opened(tmp_path)
    job = job_of(transfer.Settings(checkpoint=str(checkpoint), gpus=0, workers=1, precision="fp32"))
    broken = {0.03}

    def tuned(task, job, rows, asked, lr, *_):
        if len(rows) > len(task.train) and lr in broken:
            raise RunError("lr must be lower")
        return torch.full((len(asked), 3), lr)

    monkeypatch.setattr(grid, "_tuned", tuned)
    asked = dict(lrs=(0.01, 0.02, 0.03), decays=(0.0,), steps=1, batch=None, scores=tmp_path / "scores")
    logits, best, tried = grid.search(task, job, lambda scores, targets: float(scores[0, 0]), **asked)
    assert (best.lr, len(tried)) == (0.02, 3)
    assert float(logits[0, 0]) == pytest.approx(0.02)
    broken |= {0.01, 0.02}
    with pytest.raises(RunError, match="lr must be lower"):
        grid.search(task, job, lambda scores, targets: float(scores[0, 0]), **asked)


def test_features_that_are_not_finite_after_fine_tuning_are_the_learning_rate_s_fault(checkpoint: Path, tmp_path: Path):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    task = opened(tmp_path)
    job = job_of(transfer.Settings(checkpoint=str(checkpoint), gpus=0, workers=1, precision="fp32"))
    model = finetune.Classifier(job.encoder, 0, 3)
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(RunError, match=r"lr must be lower: .* features that are not finite \(tuning\)"):
        finetune.tested(model, job, task.images, task.test, "tuning")

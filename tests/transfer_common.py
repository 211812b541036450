"""An untrained encoder, and the transfer protocol with it in this process."""

from pathlib import Path

import pytest
import torch

from simclr_fast.distributed import Ranks
from simclr_fast.evaluation import logistic, transfer
from simclr_fast.evaluation.job import Job
from simclr_fast.evaluation.results import Result
from simclr_fast.pretrained import Encoder, Recipe

L2_VALUES = logistic.L2_VALUES  # of which most tests take five


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained resnet8 for 32 x 32 pixels."""
    torch.manual_seed(0)
    encoder = Encoder(Recipe(arch="resnet8", width=0.25, image_size=32), "")
    path = tmp_path_factory.mktemp("weights") / "untrained.pt"
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.network.state_dict().items()}
    torch.save({"recipe": vars(encoder.recipe), "method": weights}, path)
    return path


@pytest.fixture(autouse=True)
def own_cache_and_fewer_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SIMCLR_FAST_DATA", str(tmp_path / "kept"))
    monkeypatch.setattr(logistic, "L2_VALUES", L2_VALUES[::11])


def evaluated(checkpoint: Path, folder: Path, said: list[str] | None = None, **options) -> Result:
    settings = transfer.Settings(
        checkpoint=str(checkpoint), data=str(folder), gpus=0, workers=1, precision="fp32", **options
    )
    return transfer.run(settings, job_of(settings, said))


def job_of(settings: transfer.Settings, said: list[str] | None = None) -> Job:
    job = Job(settings, Ranks(use_gpu=False), (said if said is not None else []).append)
    torch.set_num_threads(1)  # of tensors this small, more are slower
    return job

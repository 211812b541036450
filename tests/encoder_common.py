"""Runs that were never trained, for tests of what takes their encoders."""

import json
from pathlib import Path

import torch

from simclr_fast import checkpoint
from simclr_fast.methods.simclr import Config, Method

TINY = dict(arch="resnet8", width=0.125, image_size=16, head_features=8)


def saved(folder: Path, seed: int = 0, **changes) -> Method:
    """A run's folder as the trainer leaves it, and its method in eval mode; the first one is also the best."""
    torch.manual_seed(seed)
    config = Config(**(TINY | changes))
    method = Method(config)
    for buffer in method.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    state = {"step": 3 + seed, "method": method.state_dict(), "config": vars(config)}
    checkpoint.save(folder / "checkpoints", state, best=seed == 0)
    (folder / "config.json").write_text(json.dumps(vars(config)))
    return method.eval()

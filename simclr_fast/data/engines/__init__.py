"""What makes views of images: DALI, torchvision, or pixels that lie on the device (see choice.py)."""

from simclr_fast.data.engines.choice import ENGINES, choose, engine_name, run
from simclr_fast.data.engines.feed import Batch, Meter, Settings, replaced

__all__ = ["ENGINES", "Batch", "Meter", "Settings", "choose", "engine_name", "replaced", "run"]

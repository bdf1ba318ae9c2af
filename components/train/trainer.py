"""Ray's trainer, without what would have nothing to do, and ending when its training does."""

import os
from typing import Any

from ray.train.torch import TorchTrainer

from components.environment import OWN_RAY

CLEANER = "PlacementGroupCleanerCallback"
STOP_S = 2.0


class Trainer(TorchTrainer):
    """One that starts no process to deal out data sets where there are none, and no cleaner in a Ray of our own.

    Ray's placement group cleaner asks the dashboard whether the controller lives, which a Ray of our own doesn't have
    (``pipelines.cluster.free_placement_groups`` does its work there). In another Ray without one it repeats the
    question for 20 s, and its stop would wait for 12 s of them. (In Ray 2.60 the time is a field of a callback; where
    another Ray keeps it elsewhere, the wait is back.)
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = set() if self.datasets else {"DatasetsCallback"}
        if OWN_RAY in os.environ:
            unneeded.add(CLEANER)
        callbacks: list[Any] = super()._create_default_callbacks()
        for callback in callbacks:
            if type(callback).__name__ == CLEANER:
                callback._stop_timeout = STOP_S
        return [one for one in callbacks if type(one).__name__ not in unneeded]

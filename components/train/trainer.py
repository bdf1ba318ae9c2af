"""Ray's trainer, which ends when its training does."""

from typing import Any

from ray.train.torch import TorchTrainer

STOP_S = 2.0


class Trainer(TorchTrainer):
    """One that doesn't wait 12 s at its end for an answer that nobody gives.

    Ray's placement group cleaner asks the dashboard whether the controller lives. A Ray of our own has no dashboard:
    the question is repeated for 20 s, and the cleaner's stop waits for its end. Where there is a dashboard it answers
    at once. (In Ray 2.60 the time is a field of a callback; where another Ray keeps it elsewhere, the wait is back.)
    Without data sets there is also no process that would deal them out.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        for callback in callbacks:
            if type(callback).__name__ == "PlacementGroupCleanerCallback":
                callback._stop_timeout = STOP_S
        return [one for one in callbacks if self.datasets or type(one).__name__ != "DatasetsCallback"]

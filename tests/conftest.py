"""How the tests are shared out among processes (`make test`)."""

import multiprocessing
import os
from typing import Any

import pytest

# What tests with several ranks start is forked from one process that has imported this already.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "components.train.learner", "model"])

# Else each of the hundreds of processes that tests start would compile our modules for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Files whose tests look at the same run or use the same Ray: one process makes it for all of them. Other files stay
# whole too.
GROUPS = {
    "faults": {"unbroken": ("test_driver", "test_training")},
    "integration": {
        "finished": ("test_invariance", "test_main_path", "test_mlflow", "test_report", "test_rerun", "test_tasks"),
        "own_ray": ("test_analyze", "test_incremental", "test_length", "test_quality"),
    },
}
TOGETHER = {
    f"tests/{folder}/{name}.py": group
    for folder, groups in GROUPS.items()
    for group, names in groups.items()
    for name in names
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByRun(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByRun(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins, so that the quick ones fill the end."""
    items.sort(key=lambda item: (group_of(item.nodeid) not in TOGETHER.values(), not item.get_closest_marker("slow")))


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)

"""How the tests are shared out when several processes run them (`make test`: two)."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests of a folder stay in one process, one after the other: they share runs, and each fills a machine."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(item.path.parent.name))

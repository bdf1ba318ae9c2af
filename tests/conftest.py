"""How the tests are shared out among processes (`make test`)."""

import pytest

SHARED = ("finished", "unbroken")  # runs that tests of several files look at


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process makes each shared run, once; other files stay whole. The slow ones begin, the quick fill the end."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        run = next((name for name in SHARED if name in getattr(item, "fixturenames", ())), file)
        item.add_marker(pytest.mark.xdist_group(run))
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    group = next(item.iter_markers("xdist_group")).args[0]
    if group in SHARED:
        return SHARED.index(group)
    return len(SHARED) + (item.get_closest_marker("slow") is None)

"""The work of each process of a test run: the one that hands the tests out imports nothing heavy."""

import importlib

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures where tests run: here or in the workers of pytest-xdist, not in the process above these."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.register(importlib.import_module("fixtures"), "shared fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the long tests first, so that no core waits for one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)

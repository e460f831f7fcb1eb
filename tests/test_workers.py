"""How the tests are divided among the workers of pytest-xdist."""

from __future__ import annotations

import pytest


def test_what_shares_a_fixture_stays_with_one_worker(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("loadgroup", False):
        pytest.skip("needs --dist loadgroup")
    grouped = [item.nodeid for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert grouped
    assert [name for name in grouped if "@" not in name] == []  # pytest-xdist writes the group into the name

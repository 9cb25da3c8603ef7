"""Processes of a run."""

import pytest

from tests.helpers.forked import Forker


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    with Forker(tmp_path_factory.mktemp("logs")) as forker:
        yield forker

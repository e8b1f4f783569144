"""Workers that end, in all states: the others must learn of it at once, and go on."""

from __future__ import annotations

import json

import deaths  # registers its cases
import launcher
import losses
import pytest
from launcher import Command
from test_worlds import mpich

pytestmark = [mpich, pytest.mark.timeout(1200)]  # the first test runs all cases


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By case, for those that are selected."""
    mine = [item for item in request.session.items if item.parent is request.node]
    names = [item.callspec.params["name"] for item in mine]
    command = Command(["main", deaths.__name__, str(tmp_path_factory.mktemp("losses")), *names], {}, forked=True)
    _, output = launcher.run_commands([command], 60 + losses.LIMIT * len(names))
    return dict(json.loads(line) for line in output.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", losses.CASES)
def test_loss(problems: dict[str, list[str]], name: str) -> None:
    assert name in problems, "it was not run"
    if problems[name]:
        pytest.fail("\n".join(problems[name]), pytrace=False)

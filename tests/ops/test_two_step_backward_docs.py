"""The documentation's example runs, and its tables name every option."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

from twostep import ops

PAGE = Path(__file__).parents[2] / "docs" / "two_step_backward.md"


def test_the_example_runs() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted >= 9 and outcome.failed == 0


def test_every_option_is_in_the_table_with_its_default() -> None:
    documented = dict(re.findall(r"^\| `(\w+)=([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE))
    parameters = inspect.signature(ops.two_step_backward).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "mode"}
    assert documented.keys() == options.keys()
    for name, default in options.items():
        assert documented[name].replace('"', "'") == repr(default), name

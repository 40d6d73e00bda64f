"""Errors for users: the message, and the section of the guides that helps."""

import pickle

from spidr.tools.errors import InputError, ProblemsError


def test_the_guide_is_named_on_the_same_line_if_the_message_has_one_line() -> None:
    error = pickle.loads(pickle.dumps(InputError("a.csv: no row", guide="pretrain.md")))
    assert str(error) == "a.csv: no row"
    assert error.with_guide() == "a.csv: no row (see docs/pretrain.md)"
    assert error.__notes__ == ["see docs/pretrain.md"]
    problems = ProblemsError([("run.a", "missing"), ("run.b", "missing")], "c.toml", guide="pretrain.md")
    assert problems.with_guide().splitlines()[-1] == "(see docs/pretrain.md)"
    assert InputError("a.csv: no row").with_guide() == "a.csv: no row"

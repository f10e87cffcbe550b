"""Ends a run as a signal would, at a moment of a test's choice."""

from collections.abc import Callable

import pytest

from tests.counting import injected


class Killed(BaseException):
    """Nothing in the package catches it."""


def killing(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int | None], None]:
    """`arm(after)`: the next run ends once that method was called so many times; None: never."""
    whole = getattr(owner, name)

    def arm(after: int | None) -> None:
        calls = 0

        def called(*arguments: object) -> None:
            nonlocal calls
            whole(*arguments)
            calls += 1
            if calls == after:
                injected("killed runs")
                raise Killed

        monkeypatch.setattr(owner, name, called)

    return arm

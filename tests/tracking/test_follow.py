"""How often the follower tries again."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kraken_train.common.errors import ConfigError
from kraken_train.tracking import follow


@pytest.mark.parametrize(("error", "attempts"), [(ConfigError("no key"), 1), (OSError("gone"), follow.ATTEMPTS)])
def test_only_what_may_pass_is_tried_again(error: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(follow, "make_backend", fail)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0)
    with pytest.raises(type(error)):
        follow.follow_with_retries(cast(Any, None), "online", cast(Any, None))
    assert len(calls) == attempts

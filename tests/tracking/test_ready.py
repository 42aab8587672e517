"""What is refused before training starts: no login, no package."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from parity.common import settings

from kraken_train.common.errors import ConfigError
from kraken_train.settings.tracking import TrackingConfig
from kraken_train.tracking.ready import require_ready


def tracking(kind: str, mode: str) -> TrackingConfig:
    return dataclasses.replace(settings().tracking, kind=kind, mode=mode)


def test_login(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    nobody = {"NETRC": str(netrc), "WANDB_CONFIG_DIR": str(tmp_path)}
    online = tracking("wandb", "online")
    with pytest.raises(ConfigError, match=r"tracking\.mode=online.*api\.wandb\.ai.*netrc cannot be read.*wandb login"):
        require_ready(online, nobody)
    require_ready(tracking("wandb", "offline"), nobody)
    require_ready(tracking("wandb", "off"), nobody)
    require_ready(online, nobody | {"WANDB_API_KEY": "k"})
    require_ready(online, nobody | {"WANDB_IDENTITY_TOKEN_FILE": "f"})

    netrc.write_text("machine api.wandb.ai login user password k\n")
    require_ready(online, nobody)
    elsewhere = nobody | {"WANDB_BASE_URL": "https://wandb.example.com"}
    with pytest.raises(ConfigError, match=r"has no entry for wandb\.example\.com"):
        require_ready(online, elsewhere)
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.com\n")
    with pytest.raises(ConfigError, match=r"has no entry for wandb\.example\.com"):
        require_ready(online, nobody)
    netrc.write_text("machine wandb.example.com login user password k\n")
    require_ready(online, nobody)
    netrc.write_text("machine")
    with pytest.raises(ConfigError, match="netrc cannot be read"):
        require_ready(online, nobody)


def test_tensorboard_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    require_ready(tracking("tensorboard", "offline"), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kraken-train\[tensorboard\]'"):
        require_ready(tracking("tensorboard", "offline"), {})
    require_ready(tracking("tensorboard", "off"), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mlflow"}, r"tracking\.kind=mlflow is not known; use wandb or tensorboard"),
        ({"kind": "tensorboard", "mode": "online"}, "TensorBoard only has files"),
        ({"finish_seconds": -1.0}, r"tracking\.finish_seconds=-1\.0 must be at least 0"),
    ],
)
def test_settings(changes: dict[str, str | float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(settings().tracking, **changes).validate()

"""Checks before training starts that the tracker can be used, without loading its library."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from kraken_train.common.errors import ConfigError
from kraken_train.settings.tracking import TrackingConfig

PUBLIC_SERVICE = "https://api.wandb.ai"


def require_ready(tracking: TrackingConfig, environment: Mapping[str, str]) -> None:
    """Raises ConfigError if TensorBoard's package is missing, or the login for Weights & Biases."""
    if tracking.mode == "off":
        return
    if tracking.kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.kind=tensorboard: the package tensorboard is not installed; use tracking=wandb, or "
            "pip install 'kraken-train[tensorboard]'"
        )
    if tracking.kind == "wandb" and tracking.mode == "online":
        require_login(environment)


def require_login(environment: Mapping[str, str]) -> None:
    """Raises ConfigError if there is no login."""
    settings = read_settings(environment)
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or "api_key" in settings:
        return
    service = environment.get("WANDB_BASE_URL") or settings.get("base_url") or PUBLIC_SERVICE
    host, path = urlsplit(service).netloc, Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        if netrc.netrc(path).authenticators(host) is not None:
            return
        lacks = f"{path} has no entry for {host}"
    except (OSError, netrc.NetrcParseError) as error:
        lacks = f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else error})"
    raise ConfigError(
        f"tracking.mode=online, but there is no login for Weights & Biases at {host}: WANDB_API_KEY is not set and "
        f"{lacks}; run `wandb login`, or use tracking.mode=offline or off"
    )


def read_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What `wandb login --host` and `wandb` have left for all runs of this user."""
    folder = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
        return dict(parser["default"]) if parser.has_section("default") else {}
    except (OSError, configparser.Error):
        return {}

"""What collectives cost, and the profiles that are shipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import ConfigError
from kraken_train.planning.interconnect import Interconnect

PROFILES = sorted(path.stem for path in (CONF_DIR / "interconnect").glob("*.yaml"))
REFERENCE = Interconnect("h100_nvswitch", latency_us=12.0, bus_bandwidth=380.0, source="")


def load(name: str) -> Interconnect:
    return Interconnect(**yaml.safe_load((CONF_DIR / "interconnect" / f"{name}.yaml").read_text()))


def test_costs() -> None:
    # A ring of 8 sends 14 pieces of an eighth each, over every link: 14 x 1 MB at 380 GB/s.
    assert REFERENCE.all_reduce_seconds(8_000_000, 8) == pytest.approx(12e-6 + 14e6 / 380e9, rel=1e-12)
    # To gather, it sends 7 of them.
    assert REFERENCE.all_gather_seconds(8_000_000, 8) == pytest.approx(12e-6 + 7e6 / 380e9, rel=1e-12)
    # Between two, an all-reduce moves the whole buffer once.
    assert replace(REFERENCE, latency_us=0).all_reduce_seconds(380, 2) == pytest.approx(1e-9, rel=1e-12)
    assert replace(REFERENCE, bus_bandwidth=None).all_reduce_seconds(10**12, 4) == 12e-6
    assert load("free").all_reduce_seconds(10**12, 4) == load("free").all_gather_seconds(10**12, 4) == 0


def test_one_shot_where_it_is_faster() -> None:
    """Each rank reads the values of all others at once: for small sums, and for few ranks."""
    one_shot = load("h100_one_shot")
    assert replace(one_shot, name="h100_nvswitch", source="", one_shot_latency_us=None, one_shot_bandwidth=None) == (
        REFERENCE
    )
    assert one_shot.all_reduce_seconds(2**19, 4) == pytest.approx(6e-6 + 3 * 2**19 / 390e9, rel=1e-12)
    assert one_shot.all_reduce_seconds(2**19, 4) == pytest.approx(10e-6, rel=0.01)  # what vLLM measured
    assert one_shot.all_reduce_seconds(10**8, 4) == REFERENCE.all_reduce_seconds(10**8, 4)
    assert one_shot.all_gather_seconds(128, 8) == pytest.approx(6e-6, rel=1e-3)
    for size in (1, 10**4, 10**6, 10**8):
        for ranks in (2, 4, 8):
            assert one_shot.all_reduce_seconds(size, ranks) <= REFERENCE.all_reduce_seconds(size, ranks)
    assert str(one_shot) == "h100_one_shot: 12 us, 380 GB/s, one-shot 6 us"


def test_profiles() -> None:
    assert PROFILES == [
        "a100_nvswitch", "ethernet_100g", "free", "h100_nvswitch", "h100_one_shot", "infiniband_200g",
        "infiniband_400g", "pcie4",
    ]  # fmt: skip
    for name in PROFILES:
        profile = load(name)
        profile.validate()
        assert profile.name == name
        assert not profile.is_overridden
        assert "github.com/" in profile.source or profile.is_free
    assert replace(load("h100_nvswitch"), source="") == REFERENCE
    assert REFERENCE.is_overridden
    assert replace(REFERENCE, name="mine").is_overridden
    megabytes = [load(name).all_reduce_seconds(10**7, 4) for name in ("h100_nvswitch", "a100_nvswitch", "pcie4")]
    assert megabytes == sorted(megabytes)


def test_rules() -> None:
    for change, message in (
        ({"latency_us": -1.0}, "interconnect.latency_us=-1.0 must be at least 0"),
        ({"latency_us": float("nan")}, "interconnect.latency_us=nan must be"),
        ({"latency_us": 1e9}, "latency_us=1e.09 is more than a second; it is in microseconds"),
        ({"bus_bandwidth": 0.0}, "interconnect.bus_bandwidth=0.0 must be greater than 0"),
        ({"one_shot_bandwidth": 0.0}, "interconnect.one_shot_bandwidth=0.0 must be greater than 0"),
        ({"one_shot_latency_us": -1.0}, "interconnect.one_shot_latency_us=-1.0 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(REFERENCE, **change).validate()

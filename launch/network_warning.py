"""The cost of all-reduces over the network, for a job in which the ranks of a model replica are on several nodes."""

from __future__ import annotations

import yaml

from kraken_train.common.cli import CONF_DIR
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.planning.interconnect import Interconnect

WITHIN_NODE, BETWEEN_NODES = "h100_nvswitch", "ethernet_100g"  # of conf/interconnect


def network_warning(config: TrainConfig, model: ModelConfig, ranks_per_node: int) -> str | None:
    """A warning if model replicas do not fit into nodes; None if they do."""
    size = config.parallel.sub_layer_parallel_size
    if ranks_per_node % size == 0:
        return None
    bytes_per_number = 4 if config.precision == "fp32" else 2  # precision=auto is a 16-bit format on GPUs
    tokens = config.micro_batch_size * model.context_length
    # Per micro-batch, forward and backward: all-reduces and the bytes of each.
    messages = [(one.count, tokens * one.width * bytes_per_number) for one in model.all_reduces]
    number = sum(count for count, _ in messages)
    total_bytes = sum(count * message_bytes for count, message_bytes in messages)
    micro_batches = max(config.batch_sizes) // config.micro_batch_size
    within, between = (
        sum(count * link.all_reduce_seconds(message_bytes, size) for count, message_bytes in messages)
        for link in map(read_interconnect, (WITHIN_NODE, BETWEEN_NODES))
    )
    return (
        f"warning: parallel.sub_layer_parallel_size={size} does not divide ranks_per_node={ranks_per_node}, so ranks "
        f"of a model replica communicate over the network: per micro-batch {number} all-reduces of "
        f"{total_bytes / 1e6:,.3g} MB in all, which take {1e3 * between:,.3g} ms on {BETWEEN_NODES} and "
        f"{1e3 * within:,.3g} ms on {WITHIN_NODE}; {total_bytes * micro_batches / 1e9:,.3g} GB per step over all "
        f"{micro_batches} micro-batches. Place all ranks of a replica in one node"
    )


def read_interconnect(name: str) -> Interconnect:
    return Interconnect(**yaml.safe_load((CONF_DIR / "interconnect" / f"{name}.yaml").read_text(encoding="utf-8")))

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
    all_reduces = sum(one.count for one in model.all_reduces)  # per micro-batch, forward and backward
    bytes_per_number = 4 if config.precision == "fp32" else 2  # precision=auto is a 16-bit format on GPUs
    message_bytes = config.micro_batch_size * model.context_length * model.hidden_size * bytes_per_number
    micro_batches = max(config.batch_sizes) // config.micro_batch_size
    within, between = (
        all_reduces * read_interconnect(name).all_reduce_seconds(message_bytes, size)
        for name in (WITHIN_NODE, BETWEEN_NODES)
    )
    return (
        f"warning: parallel.sub_layer_parallel_size={size} does not divide ranks_per_node={ranks_per_node}, so ranks "
        f"of a model replica communicate over the network: per micro-batch {all_reduces} all-reduces of "
        f"{message_bytes / 1e6:,.3g} MB, which take {1e3 * between:,.3g} ms on {BETWEEN_NODES} and {1e3 * within:,.3g} "
        f"ms on {WITHIN_NODE}; {all_reduces * message_bytes * micro_batches / 1e9:,.3g} GB per step over all "
        f"{micro_batches} micro-batches. Place all ranks of a replica in one node"
    )


def read_interconnect(name: str) -> Interconnect:
    return Interconnect(**yaml.safe_load((CONF_DIR / "interconnect" / f"{name}.yaml").read_text(encoding="utf-8")))

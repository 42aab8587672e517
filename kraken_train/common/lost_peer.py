"""The texts by which a rank tells that another one has ended or does not answer.

Such a rank is not the cause of the failure: the other one's own message has it. Sources: the errors of gloo
(`pair.cc`), of PyTorch (`TCPStore`, `ProcessGroupNCCL.cpp`, `NCCLUtils.cpp`) and of NCCL (`ncclGetErrorString`,
`socket.cc`, `net_ib`), of which each version words some differently. Within a machine NCCL often says nothing, and the
kernels wait for ever; there the watchdog ends the job.
"""

from __future__ import annotations

import re

LOST_PEER = (
    # gloo, and the reasons that it and NCCL take from the system
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "application timeout caused pair closure",
    # PyTorch's store, of which the process has ended
    "did the remote server shutdown or crash",
    # NCCL: ncclRemoteError; some versions report the last line alone, as ncclInternalError (NVIDIA/nccl#795)
    "remote process exited or there was a network error",
    "a remote process exiting prematurely",
    "unexpected exit of a remote peer",
    "connection closed by remote peer",
    "got completion from peer",
    # PyTorch's watchdog of NCCL
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
    "dump signal due to a collective timeout",
)
# A rank that has failed by itself may end with the same texts, after those of its own failure.
OWN_FAILURE = ("cuda error", "cuda failure", "unhandled cuda", "call to cuda function failed", "out of memory")

# What PyTorch's watchdog of NCCL prints before it ends the process with SIGABRT:
# "[rank9]:[E1010 06:10:06 ProcessGroupNCCL.cpp:2059] [PG ID 0 ... Rank 9] Process group watchdog thread terminated
# with exception: NCCL error: remote process exited or there was a network error, NCCL version 2.20.5"
ABORTING_RANK = re.compile(r"\[rank(\d+)\]:\[E.*(?:watchdog|NCCL)", re.IGNORECASE)


def tells_of_lost_peer(text: str) -> bool:
    """Whether this error says that another rank has ended or does not answer, and nothing of an own failure."""
    text = text.lower()
    return any(words in text for words in LOST_PEER) and not any(words in text for words in OWN_FAILURE)


def rank_that_lost_a_peer(line: str) -> int | None:
    """The rank that has printed this line about a lost peer, as PyTorch does before it aborts the process."""
    match = ABORTING_RANK.search(line)
    return int(match[1]) if match is not None and tells_of_lost_peer(line) else None

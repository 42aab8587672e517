"""The texts are those that users have reported of PyTorch, NCCL and gloo."""

from __future__ import annotations

import pytest

from kraken_train.common.lost_peer import rank_that_lost_a_peer, tells_of_lost_peer

NCCL_ERROR = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3763, "
OF_A_PEER = {
    "gloo, a killed rank": "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[127.0.0.1]:19333",
    "gloo, a reset": "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:598] Read error [127.0.0.1]:4031: "
    "Connection reset by peer",
    "gloo, a silent rank": "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
    "1800000ms for recv operation to complete",
    "the store": "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "NCCL 2.28, sockets": f"{NCCL_ERROR}remote process exited or there was a network error, NCCL version 2.28.8\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node-2<33759>",
    "NCCL 2.21, a reset": f"{NCCL_ERROR}remote process exited or there was a network error, NCCL version 2.21.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgressOpt: Call to recv from 172.18.0.5<33759> failed : Connection reset by peer",
    "NCCL, as an internal error": f"{NCCL_ERROR}internal error, NCCL version 2.14.3\nncclInternalError: Internal check "
    "failed.\nLast error:\nNet : Connection closed by remote peer node-2<50260>",
    "NCCL, InfiniBand": f"{NCCL_ERROR}remote process exited or there was a network error, NCCL version 2.20.5\n"
    "Last error:\nNET/IB : Got completion from peer 172.21.17.89<38536> with error 12, opcode 0, len 0, vendor err 129",
    "PyTorch, afterwards": "NCCL communicator was aborted on rank 1.  Original reason for failure was: NCCL error: "
    "remote process exited or there was a network error, NCCL version 2.18.5",
    "PyTorch, a silent rank": "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, "
    "OpType=ALLREDUCE, NumelIn=98, NumelOut=98, Timeout(ms)=600000) ran for 600020 milliseconds before timing out.",
}
OWN = {
    "an own error on the GPU": "CUDA error: an illegal memory access was encountered",
    "NCCL about an own error": f"{NCCL_ERROR}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
    "2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "PyTorch, after an own error": "NCCL communicator was aborted on rank 1.  Original reason for failure was: CUDA "
    "error: an illegal memory access was encountered",
    "memory": "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "a duplicate GPU": f"{NCCL_ERROR}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected",
    "a shape": "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
}


@pytest.mark.parametrize("text", OF_A_PEER.values(), ids=OF_A_PEER)
def test_a_lost_peer(text: str) -> None:
    assert tells_of_lost_peer(text)


@pytest.mark.parametrize("text", OWN.values(), ids=OWN)
def test_an_own_failure(text: str) -> None:
    assert not tells_of_lost_peer(text)


def test_a_rank_that_pytorch_aborts() -> None:
    before = "[rank9]:[E1010 06:10:06.884903881 ProcessGroupNCCL.cpp:2059] [PG ID 0 PG GUID 0(default_pg) Rank 9] "
    ends = "Process group watchdog thread terminated with exception: "
    remote = "NCCL error: remote process exited or there was a network error, NCCL version 2.20.5"
    assert rank_that_lost_a_peer(before + ends + remote) == 9
    assert rank_that_lost_a_peer(before + OF_A_PEER["PyTorch, a silent rank"]) == 9
    assert rank_that_lost_a_peer(before + ends + OWN["an own error on the GPU"]) is None
    assert rank_that_lost_a_peer(f"error: {remote}") is None

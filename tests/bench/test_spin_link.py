"""The kernel of a simulated collective, compiled without a GPU: the shared memory that it reserves."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
compiler, target = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")

from kraken_train.bench.spin_link import (  # noqa: E402 (it imports Triton)
    AT_ONCE,
    KERNELS,
    NUM_WARPS,
    SCRATCH,
    reserved_bytes,
    with_shared_memory,
)

OPTIN = {"H100": 232448, "A100": 166912, "L40S": 101376}  # bytes that a block can have, of one byte less in all blocks


@pytest.mark.parametrize("device", OPTIN)
def test_no_two_blocks_share_a_multiprocessor(device: str) -> None:
    reserved = reserved_bytes(OPTIN[device])
    assert reserved >= min(100 * 1024, OPTIN[device])
    assert 2 * reserved > OPTIN[device] + 1024
    assert reserved <= OPTIN[device]


@pytest.mark.parametrize("collective", KERNELS)
def test_reserved_shared_memory(collective: str) -> None:
    """What Triton loads the kernel with and what it launches it with."""
    types = {"source": "*i32", "target": "*i32", "values": "i32", "nanoseconds": "i32"}
    constants = {"AT_ONCE": AT_ONCE, "SCRATCH": SCRATCH}
    source = compiler.ASTSource(
        fn=KERNELS[collective], signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    kernel = triton.compile(source, target=target.GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
    assert kernel.metadata.name == f"{collective}_spin"
    assert kernel.asm["ptx"].count("%globaltimer") == 3  # each loop reads the clock anew
    with_shared_memory(kernel, 120_000)
    assert kernel.module is None
    assert kernel.metadata.shared == 120_000
    assert kernel.packed_metadata == (NUM_WARPS, 1, 120_000)

"""The exchange over ranks: exact, in the right order, hidden behind the attention; and checksums that see a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.common import MODELS
from parity.communicator_checks import DELAY

LAYERS = MODELS["kraken-4"].num_layers
PLACES = [(2, 2), (4, 2), (4, 4)]  # ranks, ranks of a copy
RIVALS = ("ladder", "fal")  # architectures whose residual stream has a part of its gradient on each rank
Launched = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_golden_file_over_ranks(launched: Launched, ranks: int, size: int) -> None:
    errors = launched(ranks)["exchange"][str(size)]["golden"]
    assert errors["logits"] < 1e-12
    assert errors["loss"] < 1e-13
    assert errors["gradients"] < 1e-6


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_equal_to_the_whole_model(launched: Launched, ranks: int, size: int) -> None:
    found = launched(ranks)["exchange"][str(size)]["architectures"]
    assert len(found) >= 3 * 3  # models, with a whole and a sharded vocabulary, and with documents apart
    for case, errors in found.items():
        assert max(errors["logits"], errors["losses"], errors["z_loss"]) < 1e-13, case
        assert errors["gradients"] < 1e-12, case


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_documents_do_not_leak(launched: Launched, ranks: int, size: int) -> None:
    found = launched(ranks)["exchange"][str(size)]["leaks"]
    assert all(leaks == {"apart=False": True, "apart=True": False} for leaks in found.values()), found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_order_of_events(launched: Launched, ranks: int, size: int, apart: bool) -> None:
    events = launched(ranks)["exchange"][str(size)]["events"]
    later, later_backward = LAYERS - 1, LAYERS - 1
    assert events[f"recompute=False, apart={apart}"] == [
        "attention", "ffn",
        *["start", "attention", "wait", "ffn"] * later,
        "start", "wait",  # the conjunction
        "loss",
        *["ffn backward", "start", "attention backward", "attention done", "wait"] * later_backward,
        "ffn backward", "attention backward", "attention done",
        "start", "wait",  # the gradient of the embedding
    ]  # fmt: skip
    # With recomputation the parts run once more, and nothing else changes.
    again = ["attention backward", "attention", "attention done"]
    assert events[f"recompute=True, apart={apart}"] == [
        "attention", "ffn",
        *["start", "attention", "wait", "ffn"] * later,
        "start", "wait",
        "loss",
        *["ffn backward", "ffn", "start", *again, "wait"] * later_backward,
        "ffn backward", "ffn", *again,
        "start", "wait",
    ]  # fmt: skip


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_number_of_collectives(launched: Launched, ranks: int, size: int) -> None:
    counted = launched(ranks)["exchange"][str(size)]["collectives"]
    per_layer = {"kraken-4": 1, "parallel": 1, "standard": 2, "ladder": 2}
    for name, number in per_layer.items():
        for recompute in (False, True):
            assert counted[f"{name} forward recompute={recompute}"] == number * LAYERS
            of_gains = 1 if name.startswith(RIVALS) else 0
            assert counted[f"{name} both recompute={recompute}"] == 2 * number * LAYERS + of_gains
    for check, number in counted.items():  # of all models, as they declare it
        model = MODELS[check.split()[0]]
        declared = sum(all_reduces.count for all_reduces in model.all_reduces)
        # Of gains that ranks share, those of queries and keys and in rivals all, the gradients take one sum.
        of_all_norms = check.startswith(RIVALS)
        gains = 1 if of_all_norms or (model.qk_norm and model.is_baseline) else 0
        assert number == (declared + gains if " both " in check else declared // 2), check


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_reduction_dtype(launched: Launched, ranks: int, size: int) -> None:
    assert launched(ranks)["exchange"][str(size)]["dtypes"] == [
        "torch.bfloat16 None -> torch.bfloat16",
        "torch.bfloat16 torch.float32 -> torch.float32",
        "torch.bfloat16 torch.bfloat16 -> torch.bfloat16",
        "torch.float32 torch.bfloat16 -> torch.float32",
    ]


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_checksums_name_the_parameter_and_the_rank(launched: Launched, ranks: int, size: int) -> None:
    found = launched(ranks)["exchange"][str(size)]["replicas"]
    for name in ("token_embedding.weight", "final_norm.weight", "layers.1.ffn.up.weight"):
        assert found[f"{name} restored"] == ""
        if "layers" in name and ranks == size:  # nobody else holds it
            assert found[f"{name} flipped"] == ""
        else:
            message = (
                f"{name} is not the same on all ranks that hold it: rank {ranks - 1} has other bits than the first"
            )
            assert found[f"{name} flipped"].startswith(message)


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_sums_in_another_order_do_not_part_the_ranks(launched: Launched, ranks: int, size: int) -> None:
    assert launched(ranks)["exchange"][str(size)]["unequal sums"] == ""


@pytest.mark.parametrize(("ranks", "size"), PLACES)
def test_ranks_of_a_copy_are_adjacent(launched: Launched, ranks: int, size: int) -> None:
    found = launched(ranks)["exchange"][str(size)]["groups"]
    for rank, (copy, across) in enumerate(found):
        assert copy == [rank - rank % size + i for i in range(size)]
        assert across == list(range(rank % size, ranks, size))


@pytest.mark.parametrize(
    ("launch", "check"), [(2, "overlap"), pytest.param("slow 2", "busy-overlap", marks=pytest.mark.slow)]
)
def test_delays_are_hidden_behind_the_attention(launched: Launched, launch: int | str, check: str) -> None:
    seconds = launched(launch)[check]
    assert seconds["delays"] >= 0.79
    assert seconds["attention"] > DELAY
    assert seconds["hidden"] - seconds["undelayed"] <= 0.10 * seconds["delays"], seconds
    assert seconds["waiting"] - seconds["undelayed"] >= 0.90 * seconds["delays"], seconds

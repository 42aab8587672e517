"""Muon against PyTorch's on the separate matrices; steps that it skips; and matrices that lie on several ranks."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from helpers import shareable_configs, small_configs
from plain_muon import PlainMuon, is_vocabulary, split
from torch import Tensor, nn

from kraken_train.model.config import KrakenConfig, ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.parallel.matrix_exchange import MatrixExchange
from kraken_train.parallel.mesh import Place
from kraken_train.parallel.sharding import ModelRank, sharded_dims
from kraken_train.recipe.optimizers import MuonConfig
from kraken_train.training import muon
from kraken_train.training.muon import MATRICES, Muon
from kraken_train.training.optim import make_optimizer, parameter_groups, state_names

LR = 1e-2
CONFIG = MuonConfig(LR, (0.9, 0.95), 1e-8, weight_decay=0.1, max_grad_norm=0, momentum=0.9, ns_steps=4)
CONFIGS = small_configs()


class Flat:
    """A model whose weights are views of one vector for each group, as under ZeRO, and Muon for these vectors."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = build_model(config, seed=1)
        groups = parameter_groups(self.model, CONFIG.weight_decay, matrices_apart=True)
        self.weights = [group["params"] for group in groups]
        self.vectors = []
        for group in groups:
            vector = nn.Parameter(torch.cat([weight.detach().flatten() for weight in group["params"]]))
            for weight, part in zip(group["params"], self.parts(group["params"], vector.detach()), strict=True):
                weight.data = part
            group["params"] = [vector]
            self.vectors.append(vector)
        optimizer = make_optimizer(CONFIG, groups, Place(), None)
        assert isinstance(optimizer, Muon)
        self.optimizer = optimizer

    def parts(self, weights: list[nn.Parameter], vector: Tensor) -> list[Tensor]:
        parts = vector.split([weight.numel() for weight in weights])
        return [part.view(weight.shape) for weight, part in zip(weights, parts, strict=True)]

    def step(self, gradients: dict[str, Tensor]) -> None:
        names = {weight: name for name, weight in self.model.named_parameters()}
        for weights, vector in zip(self.weights, self.vectors, strict=True):
            vector.grad = torch.cat([gradients[names[weight]].flatten() for weight in weights])
        self.optimizer.step()

    def momentum(self) -> list[Tensor]:
        found = []
        for group, weights in zip(self.optimizer.param_groups, self.weights, strict=True):
            if MATRICES in group:
                found += self.parts(weights, self.optimizer.state[group["params"][0]]["momentum_buffer"])
        return found


def gradients_of(model: LanguageModel, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("batch_elements", [1, 1000])
@pytest.mark.parametrize("name", ["kraken", "kraken-mqa", "kraken-modern", "standard-gqa", "parallel-modern"])
def test_equal_to_pytorch_on_the_separate_matrices(
    name: str, batch_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", batch_elements)  # one matrix at a time; several
    config = CONFIGS[name]
    ours, plain = Flat(config), build_model(config, seed=1)
    initial = {key: weight.detach().clone() for key, weight in plain.named_parameters()}
    twin = PlainMuon(plain, config, LR, CONFIG.momentum, CONFIG.ns_steps, CONFIG.betas, CONFIG.weight_decay)
    for step in range(12):
        gradients = gradients_of(plain, step)
        for key, weight in plain.named_parameters():
            weight.grad = gradients[key].clone()
        ours.step(gradients)
        twin.step()
    by_adamw = 0
    for key, weight in plain.named_parameters():
        mine = ours.model.get_parameter(key)
        if "norm" in key or is_vocabulary(key):
            torch.testing.assert_close(mine, weight, rtol=1e-5, atol=1e-7)  # a fused kernel against a plain one
            by_adamw += 1
        elif batch_elements == 1:
            torch.testing.assert_close(mine, weight, rtol=1e-6, atol=1e-8)
        else:  # a product of a batch may round a few elements to the next number in bfloat16
            assert (mine - weight).norm() < 2e-3 * (weight - initial[key]).norm(), key
    assert by_adamw + len(twin.weights) == len(list(plain.parameters()))
    for number, momentum in enumerate(ours.momentum()):
        torch.testing.assert_close(momentum, twin.momentum_of(number), rtol=1e-6, atol=1e-8)


def test_orthogonal() -> None:
    """Singular values come close to 1, for wide and for tall matrices, whatever the scale; 0 stays 0."""
    generator = torch.Generator().manual_seed(0)
    for shape, least in ((3, 32, 64), 0.6), ((3, 64, 32), 0.6), ((1, 48, 48), 0.0):
        matrices = 1e-3 * torch.randn(shape, generator=generator)
        found = muon.orthogonalize(matrices, 5).float()
        assert found.shape == matrices.shape
        values = torch.linalg.svdvals(found)
        assert values.min() > least
        assert values.max() < 1.3
        assert (found * matrices).sum(dim=(1, 2)).min() > 0
    assert not muon.orthogonalize(torch.zeros(2, 8, 8), 5).any()


def test_skipped_step_changes_nothing() -> None:
    ours = Flat(CONFIGS["kraken"])
    ours.step(gradients_of(ours.model, 0))
    weights = [vector.detach().clone() for vector in ours.vectors]
    momentum = [part.clone() for part in ours.momentum()]
    ours.optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    ours.optimizer.grad_scale = torch.full((), torch.nan)  # type: ignore[attr-defined]
    ours.step({name: gradient * torch.inf for name, gradient in gradients_of(ours.model, 1).items()})
    assert all(map(torch.equal, weights, ours.vectors))
    assert all(map(torch.equal, momentum, ours.momentum()))
    ours.optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    ours.optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    ours.step(gradients_of(ours.model, 2))
    assert not any(map(torch.equal, weights, ours.vectors))


def test_gradients_are_scaled() -> None:
    one, scaled = Flat(CONFIGS["kraken"]), Flat(CONFIGS["kraken"])
    for step in range(3):
        gradients = gradients_of(one.model, step)
        one.step(gradients)
        scaled.optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
        scaled.step({name: 4 * gradient for name, gradient in gradients.items()})
    assert all(map(torch.equal, one.vectors, scaled.vectors))
    assert all(map(torch.equal, one.momentum(), scaled.momentum()))


def test_groups() -> None:
    model = build_model(CONFIGS["kraken-modern"])
    groups = parameter_groups(model, 0.1, matrices_apart=True)
    names = {weight: name for name, weight in model.named_parameters()}
    by_muon = {names[weight] for group in groups if MATRICES in group for weight in group["params"]}
    assert by_muon == {name for name in names.values() if "norm" not in name and not is_vocabulary(name)}
    assert {state_names(group) for group in groups} == {("momentum_buffer",), ("exp_avg", "exp_avg_sq")}
    assert not any(MATRICES in group for group in parameter_groups(model, 0.1))


# ----------------------------------------------------------------------------------------------------------------------
# Matrices on several ranks
# ----------------------------------------------------------------------------------------------------------------------


class AllToAll:
    """`torch.distributed.all_to_all_single` among threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.sent: list[Any] = [None] * ranks

    def __call__(self, output: Tensor, tensor: Tensor, received: list[int], sent: list[int], group: int) -> None:
        self.sent[group] = tensor.split(sent)
        self.barrier.wait()
        arrived = [self.sent[rank][group] for rank in range(len(self.sent))]
        assert [part.numel() for part in arrived] == received
        output.copy_(torch.cat(arrived))
        self.barrier.wait()


@pytest.mark.parametrize(("copies", "ranks"), [(1, 2), (1, 4), (2, 1), (2, 2), (7, 1), (3, 4), (40, 1)])
@pytest.mark.parametrize("name", ["kraken-4", "standard", "kraken-modern", "standard-modern"])
def test_each_matrix_is_whole_on_one_rank(name: str, copies: int, ranks: int) -> None:
    config = shareable_configs()[name]
    whole = build_model(config)
    expected = [
        matrix.reshape(-1, matrix.shape[-1])
        for key, weight in whole.named_parameters()
        if "norm" not in key and not is_vocabulary(key)
        for matrix in split(config, key, weight.detach())
    ]
    places = [Place(copy, copies, rank, ranks) for copy in range(copies) for rank in range(ranks)]
    together = AllToAll(len(places))
    owned: list[list[Tensor]] = [[] for _ in places]
    returned: list[list[bool]] = [[] for _ in places]
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            place = places[number]
            vector, parts, elements = part_of(config, whole, place)
            exchange = MatrixExchange(parts, elements, place, number, together)  # type: ignore[arg-type]
            owned[number] = exchange.gather(vector)
            changes = exchange.scatter([2 * matrix for matrix in owned[number]])
            changed = torch.zeros_like(vector)
            for piece, change in zip(exchange.pieces, changes, strict=True):
                changed[piece.begin : piece.begin + piece.length] += change
            returned[number] = [torch.equal(changed, 2 * vector)]
        except BaseException as error:
            together.barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=partial(run, number)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert returned == [[True] for _ in places]
    found = sorted((matrix for matrices in owned for matrix in matrices), key=lambda matrix: matrix.flatten().tolist())
    expected.sort(key=lambda matrix: matrix.flatten().tolist())
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    if len(places) <= 4:  # and the work is even
        loads = [sum(matrix.numel() for matrix in matrices) for matrices in owned]
        assert max(loads) < 1.35 * sum(loads) / len(loads)


def part_of(config: ModelConfig, whole: LanguageModel, place: Place) -> tuple[Tensor, list[Any], int]:
    """(its part of the vector, the matrices, elements of a part) of the rank at `place`."""
    units, _ = even_share(config, ModelRank(place.rank, place.ranks))
    model = build_model(config, 0, units, LocalCommunicator())
    (group,) = (group for group in parameter_groups(model, 0.1, matrices_apart=True) if MATRICES in group)
    cuts, names = sharded_dims(model), {weight: name for name, weight in model.named_parameters()}
    flat = []
    for weight in group["params"]:
        cut, values = cuts[names[weight]], whole.get_parameter(names[weight]).detach()
        flat.append((values if cut is None else cut.take(values)).flatten())
    vector = torch.cat(flat)
    elements = -(-vector.numel() // (2 * place.copies)) * 2
    padded = torch.cat([vector, vector.new_zeros(elements * place.copies - vector.numel())])
    return padded.split(elements)[place.copy], group[MATRICES], elements


def test_the_kraken_of_one_rank_sends_next_to_nothing() -> None:
    """Of matrices that a rank holds whole only those across a border move."""
    config = shareable_configs()["kraken-4"]
    assert isinstance(config, KrakenConfig)
    place = Place(copy=1, copies=3)
    _, parts, elements = part_of(config, build_model(config), place)
    exchange = MatrixExchange(parts, elements, place)
    largest = max(part.rows * part.columns for part in parts)
    assert exchange.moves
    assert sum(exchange.sent) - exchange.sent[1] <= largest
    assert sum(exchange.received) - exchange.received[1] <= largest

"""Curves L(N, D) = E + A / N^alpha + B / D^beta through losses of models of N parameters after D tokens.

As in "Training Compute-Optimal Large Language Models" (arXiv 2203.15556, section 3.3): L-BFGS from a grid of starts,
with the Huber loss of ln L. Here several architectures are fitted together: E, the entropy of the text, is the same for
all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

HUBER = 1e-3  # of ln L; larger errors count linearly
# Of the starts: E as a fraction of the least loss; alpha, which beta equals.
ENTROPIES, EXPONENTS = (0.3, 0.6, 0.9), (0.2, 0.5)
MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Point:
    parameters: float
    tokens: float
    loss: float  # nats per token


@dataclass(frozen=True)
class Curve:
    entropy: float  # E, nats per token
    a: float
    alpha: float
    b: float
    beta: float
    error: float  # root of the mean squared relative error of the points

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.entropy + self.a / parameters**self.alpha + self.b / tokens**self.beta)


class Curves(torch.nn.Module):
    """ln L of K architectures, with N and D in units of their geometric means, so that coefficients are near 1."""

    def __init__(self, points: Sequence[Point], owners: Sequence[int], count: int) -> None:
        super().__init__()
        self.owners = torch.tensor(owners)
        logs = torch.tensor([[math.log(p.parameters), math.log(p.tokens)] for p in points], dtype=torch.float64)
        self.means = logs.mean(dim=0)
        self.logs = logs - self.means  # (points, 2)
        self.targets = torch.tensor([math.log(p.loss) for p in points], dtype=torch.float64)
        self.entropy = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))  # ln E
        self.scales = torch.nn.Parameter(torch.zeros(count, 2, dtype=torch.float64))  # ln of A and B in these units
        self.exponents = torch.nn.Parameter(torch.zeros(count, 2, dtype=torch.float64))  # ln of alpha and beta

    def start(self, entropy: float, exponent: float) -> None:
        """`entropy` as a fraction of the least loss; what is left of the mean loss is divided equally."""
        least, mean = self.targets.exp().min().item(), self.targets.exp().mean().item()
        with torch.no_grad():
            self.entropy.fill_(math.log(entropy * least))
            self.scales.fill_(math.log((mean - entropy * least) / 2))
            self.exponents.fill_(math.log(exponent))

    def forward(self) -> torch.Tensor:
        terms = self.scales[self.owners] - self.exponents.exp()[self.owners] * self.logs  # (points, 2)
        return torch.logsumexp(torch.cat([self.entropy.expand(len(terms), 1), terms], dim=1), dim=1)

    def huber(self) -> torch.Tensor:
        return F.huber_loss(self() / HUBER, self.targets / HUBER, delta=1.0)

    def descend(self) -> float:
        """From the start to the nearest minimum; its Huber loss."""
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=MOST_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.huber()
            loss.backward()
            return loss

        optimizer.step(closure)
        return self.huber().item()


def fit(points: Mapping[str, Sequence[Point]]) -> dict[str, Curve]:
    """The curve of each architecture. Needs at least three sizes and three numbers of tokens of each."""
    names = list(points)
    owners = [index for index, name in enumerate(names) for _ in points[name]]
    curves = Curves([point for name in names for point in points[name]], owners, len(names))
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for entropy, exponent in itertools.product(ENTROPIES, EXPONENTS):
        curves.start(entropy, exponent)
        huber = curves.descend()
        if math.isfinite(huber):
            found.append((huber, {name: value.clone() for name, value in curves.state_dict().items()}))
    curves.load_state_dict(min(found, key=lambda pair: pair[0])[1])
    return {name: read_curve(curves, index) for index, name in enumerate(names)}


def read_curve(curves: Curves, index: int) -> Curve:
    with torch.no_grad():
        alpha, beta = curves.exponents[index].exp().tolist()
        a, b = (curves.scales[index] + curves.exponents[index].exp() * curves.means).exp().tolist()
        errors = (curves() - curves.targets)[curves.owners == index]
        return Curve(curves.entropy.exp().item(), a, alpha, b, beta, errors.square().mean().sqrt().item())

"""The sizes with which the stages run: conf/acceptance/NAME.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.cli import compose_choice
from kraken_train.common.settings import from_dict
from kraken_train.common.validation import require_choice, require_positive

CPU, CUDA = "cpu", "cuda"
ONE_GPU, MANY_GPUS = SETS = ("one_gpu", "many_gpus")


@dataclass(frozen=True)
class MachineSizes:
    matmul_size: int  # rows and columns of the matrices whose product gives the ceiling of FLOP/s
    copied_mib: int  # of the tensor whose copy gives the ceiling of memory bandwidth
    attention_rows: int  # sub-layers times samples of the attention whose backends are compared
    attention_tokens: int  # of each row
    repeats: int  # of what is timed


@dataclass(frozen=True)
class CurveSizes:
    bytes: tuple[int, ...]  # sizes of all-reduces, in bf16
    repeats: int  # of each


@dataclass(frozen=True)
class ParitySizes:
    num_sub_layers: int  # of the Kraken, and heads of the baseline; the ranks divide it
    hidden_size: int  # of a sub-layer
    context_length: int  # tokens of a sample
    steps: int  # that are compared


@dataclass(frozen=True)
class StepSizes:
    settings: tuple[str, ...]  # of kraken_train.bench.throughput: the model and its batch
    steps: int  # before the one that is profiled, which are compared where two runs are


@dataclass(frozen=True)
class RunSizes:
    settings: tuple[str, ...]  # of kraken_train.train
    steps: int  # after the run is continued
    save_every: int  # steps between checkpoints


@dataclass(frozen=True)
class RunRequest:
    """What a program that trains is told."""

    sizes: RunSizes
    ranks: int
    data_dir: str  # prepared data
    run_dir: str  # folder for the folders of runs


@dataclass(frozen=True)
class VllmSizes:
    python: str  # interpreter of an environment with vLLM and serving/vllm; where there is none, the figures say so
    ranks: int  # and sub-layers of the Krakens
    num_layers: int  # of the Kraken whose tokens are compared
    hidden_size: int  # of it, a multiple of 64
    compiled: bool  # also compare it compiled and with CUDA graphs
    times: tuple[str, ...]  # settings of kraken_train.bench.vllm: what is timed


@dataclass(frozen=True)
class Preset:
    """See conf/acceptance/one_gpu.yaml."""

    device: str  # cpu | cuda
    sets: tuple[str, ...]  # of stages: one_gpu, many_gpus
    limit_factor: float  # a stage is ended after so many times the minutes that it should take
    ranks: int  # of stages on many GPUs
    ranks_per_copy: int  # of those, that share one copy of a model where there are several copies
    tests: tuple[str, ...]  # arguments of pytest, for the tests marked gpu
    baseline: str  # file of conf/model: the standard Transformer that speed is compared with
    paper: str  # file of conf/model: a Kraken of the paper
    aligned: str  # file of conf/model: a Kraken of the same size with dimensions that suit matrix units
    throughput: tuple[str, ...]  # settings of kraken_train.bench.throughput, in all stages
    few_rounds: tuple[str, ...]  # further ones, where many variants are measured
    plainer: tuple[str, ...]  # further ones, of which each turns something off that makes training fast
    budgets: tuple[str, ...]  # further ones, of which each gives multiprocessors to communication or to products
    ttft: tuple[str, ...]  # settings of kraken_train.bench.ttft, in all stages
    ttft_cases: tuple[str, ...]  # further ones: what is compared with simulated collectives
    collectives: tuple[str, ...]  # settings of kraken_train.bench.ttft: the interconnects that are simulated
    real_collectives: tuple[str, ...]  # settings of it: the real ones, in the order of what simulates them
    real_cases: tuple[str, ...]  # further ones: what is compared with real and with simulated collectives
    prepare: tuple[str, ...]  # settings of data_prep.prepare, for the stages that train
    machine: MachineSizes
    kernels: StepSizes
    runs: RunSizes
    curve: CurveSizes
    parity: ParitySizes
    overlap: StepSizes
    vllm: VllmSizes

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("device", self.device, (CPU, CUDA))
        for name in self.sets:
            require_choice("sets", name, SETS)
        for name in ("limit_factor", "ranks", "ranks_per_copy"):
            require_positive(name, getattr(self, name))

    def minutes(self, of_stage: float) -> float:
        """The limit of a stage."""
        return of_stage * self.limit_factor


def load_preset(name: str) -> Preset:
    """Raises ConfigError."""
    return from_dict(compose_choice("acceptance", name), Preset)

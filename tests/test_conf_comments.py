"""The comments in conf/ are the descriptions of the settings in the dataclasses.

`make format` runs this file, which writes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.export import ExportConfig
from checkpoints.import_reference import ImportConfig as ImportReferenceConfig
from checkpoints.import_transformers import ImportConfig as ImportTransformersConfig
from checkpoints.push import PushConfig
from data_prep.foreign import ForeignConfig
from data_prep.prepare import PrepareConfig
from data_prep.tokenizer_settings import TokenizerSettings
from kraken_train.bench.acceptance import AcceptanceConfig
from kraken_train.bench.checkpoint_stall import CheckpointStallConfig
from kraken_train.bench.documents import DocumentsConfig
from kraken_train.bench.kv_memory import KVMemoryConfig
from kraken_train.bench.stages.preset import Preset
from kraken_train.bench.throughput_config import ThroughputConfig
from kraken_train.bench.topology import TopologyConfig
from kraken_train.bench.transfer import TransferConfig
from kraken_train.bench.ttft import TTFTConfig
from kraken_train.bench.vllm import VllmConfig
from kraken_train.common.cli import CONF_DIR
from kraken_train.common.setting_docs import describe, with_comments
from kraken_train.config import TrainConfig
from kraken_train.derive import DeriveConfig
from kraken_train.evaluate import EvaluateConfig
from kraken_train.generate import GenerateConfig
from kraken_train.model.config import GPTConfig, KrakenConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.track_config import TrackConfig
from kraken_train.plan import PlanConfig
from kraken_train.recipe.optimizers import AdamWConfig, MuonConfig
from kraken_train.recipe.schedules import ConstantSchedule, CosineSchedule, WSDSchedule
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.settings.tracking import TrackingConfig
from launch.slurm.config import SubmitConfig
from launch.sweep import SweepConfig

COMMANDS = {
    "acceptance": AcceptanceConfig,
    "checkpoint_stall": CheckpointStallConfig,
    "derive": DeriveConfig,
    "documents": DocumentsConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "foreign": ForeignConfig,
    "generate": GenerateConfig,
    "import_reference": ImportReferenceConfig,
    "import_transformers": ImportTransformersConfig,
    "kv_memory": KVMemoryConfig,
    "topology": TopologyConfig,
    "plan": PlanConfig,
    "prepare": PrepareConfig,
    "push": PushConfig,
    "submit": SubmitConfig,
    "sweep": SweepConfig,
    "throughput": ThroughputConfig,
    "train": TrainConfig,
    "transfer": TransferConfig,
    "ttft": TTFTConfig,
    "vllm": VllmConfig,
}
GROUPS = {
    "acceptance/*": Preset,
    "engine/*": EngineConfig,
    "model/base/fal": FALConfig,
    "model/base/gpt": GPTConfig,
    "model/base/kraken": KrakenConfig,
    "model/base/ladder": LadderConfig,
    "model/base/track": TrackConfig,
    "optim/adamw": AdamWConfig,
    "optim/muon": MuonConfig,
    "parallel/*": ParallelConfig,
    "schedule/constant": ConstantSchedule,
    "schedule/cosine": CosineSchedule,
    "schedule/wsd": WSDSchedule,
    "tokenizer/*": TokenizerSettings,
    "tracking/*": TrackingConfig,
}
FILES = {
    path: schema for pattern, schema in (COMMANDS | GROUPS).items() for path in sorted(CONF_DIR.glob(f"{pattern}.yaml"))
}


def expected(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return with_comments(text, {name: doc.description for name, doc in describe(FILES[path]).items()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_comments_are_those_of_the_dataclass(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == expected(path), "run make format"


@pytest.mark.parametrize("schema", [*COMMANDS.values(), *GROUPS.values()], ids=lambda schema: schema.__name__)
def test_every_setting_is_described(schema: type) -> None:
    assert not [name for name, doc in describe(schema).items() if not doc.description]


def test_every_command_is_covered() -> None:
    assert {path.stem for path in CONF_DIR.glob("*.yaml")} == set(COMMANDS)


def test_with_comments() -> None:
    text = """# The file.
# Its second line.
defaults:
  - model: small  # of conf/model

# --- a section ---
# old
lr: 1.0e-3  # old
name: "a # b"
group:
  inner: [1, "#2"]   # old
  other: {a: b}  # stays
"""
    descriptions = {"lr": "peak", "name": "with a hash", "group.inner": "long " * 30 + "end"}
    assert with_comments(text, descriptions) == (
        """# The file.
# Its second line.
defaults:
  - model: small  # of conf/model

# --- a section ---
lr: 1.0e-3  # peak
name: "a # b"  # with a hash
group:
"""
        f"  # {'long ' * 22}long\n  # {'long ' * 7}end\n"
        """  inner: [1, "#2"]
  other: {a: b}  # stays
"""
    )


if __name__ == "__main__":
    for file in FILES:
        file.write_text(expected(file), encoding="utf-8")

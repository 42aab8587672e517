"""Files that mean harm: code in pickles, names and links that lead elsewhere, sizes that only a header claims.

`tests/checkpoints/training/test_index.py` has those of the index of a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import ARTEFACTS, WRITTEN, sign, write_model
from forked import REPOSITORY
from helpers import small_configs
from payload import Payload

from checkpoints.exports.folder import read_export
from checkpoints.import_reference import ImportConfig, import_reference
from checkpoints.import_transformers import ImportConfig as TransformersConfig
from checkpoints.import_transformers import import_transformers
from checkpoints.push import complete_export
from checkpoints.training.index import parse_index
from checkpoints.training.manifest import content_sha256, find_complete_checkpoint
from checkpoints.training.store import read_weights
from data_prep.indexed import HEADER, MAGIC, Shard
from data_prep.manifest import load_manifest, verify_quick
from data_prep.tokenizers import load_tokenizer
from kraken_train.common.errors import CheckpointError, ConfigError, DataError, KrakenError
from kraken_train.common.files import copy_folder
from kraken_train.common.parsing import parse_json, parse_yaml
from kraken_train.evaluation.suites import register_own_model
from kraken_train.run.inventory import read_mapping
from kraken_train.run.recorded_settings import recorded_model, recorded_settings

STEP = Path("checkpoints") / "step-00000100"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    ARTEFACTS["checkpoint"](tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_model(tmp_path / "export", small_configs(320)["kraken"])
    return tmp_path / "export"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    ARTEFACTS["data"](tmp_path / "data")
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------------------------


def test_code_in_the_tensors_of_a_checkpoint_is_not_run(run: Path, tmp_path: Path) -> None:
    """The place of the first tensor holds a pickle of the same length."""
    marker = tmp_path / "was run"
    file = run / STEP / "__0_0.distcp"
    content = file.read_bytes()
    torch.save(Payload(marker), tmp_path / "payload.pt")
    payload = (tmp_path / "payload.pt").read_bytes()
    file.write_bytes(payload + content[len(payload) :])
    index = parse_index((run / STEP / ".metadata").read_bytes(), None)
    assert min(part.offset for part in index.storage_data.values()) == 0
    sign(run)
    with pytest.raises(CheckpointError):
        read_weights(run)
    assert not marker.exists()


def test_code_in_a_reference_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    torch.save({"model": {}, "model_args": Payload(marker)}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="was not"):
        import_reference(ImportConfig(str(tmp_path / "ckpt.pt"), str(tmp_path / "e"), None, None))
    assert not marker.exists()


def test_code_in_yaml_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    (tmp_path / "config.yaml").write_text(f"run_dir: !!python/object/apply:os.mkdir [{marker}]\n")
    assert read_mapping(tmp_path / "config.yaml") == {}
    assert not marker.exists()


def test_code_in_an_export_is_not_run(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it is read, nor when transformers loads it for the suites; the numbers are those of our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (takes seconds)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    marker = tmp_path / "was run"
    (export / "modeling_kraken.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    model = read_export(export).load_model()
    register_own_model()
    loaded = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=False, dtype=torch.float32)
    AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    ids = torch.arange(7, 19)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids)).abs().max() < 1e-4
    assert not marker.exists()


FORBIDDEN = {
    r"\btorch\.load\((?![^)]*weights_only=True)": "torch.load without weights_only=True",
    r"\bpickle\.loads?\(|\bmarshal\.|\bshelve\.|joblib|\bdill\b": "unpickling",
    r"allow_pickle=True": "np.load with pickles",
    r"\byaml\.(load|load_all|unsafe_load|full_load)\(": "yaml.load; use common.parsing",
    r"(?<![.\w])(eval|exec)\(": "eval or exec",
    r"trust_remote_code\"?\s*[=:]\s*True": "code of a model",
    r"FileSystemReader\(|\bdcp\.load\((?!tensors, storage_reader=reader)": "a checkpoint's index without its checks",
    r"shell=True|os\.system\(": "a shell",
}
ALLOWED = {
    ("kraken_train/reporting/model_card.py", "code of a model"),  # what a model card tells its reader to do
    ("checkpoints/exports/modeling_kraken.py", "code of a model"),  # likewise
    ("checkpoints/exports/native.py", "code of a model"),
}


def test_nothing_else_reads_what_could_run() -> None:
    found = set()
    for room in ("kraken_train", "data_prep", "checkpoints", "launch", "serving"):
        for path in (REPOSITORY / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(REPOSITORY).as_posix()
            found |= {(name, what) for pattern, what in FORBIDDEN.items() if re.search(pattern, text)}
    assert found == ALLOWED


# ---------------------------------------------------------------------------------------------------------------
# Names and links
# ---------------------------------------------------------------------------------------------------------------

NAMES = ["../secret", "/etc/passwd", "a/../../secret", ".", "..", "a/b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_manifest_of_a_checkpoint(run: Path, name: str) -> None:
    path = run / STEP / "manifest.json"
    content = json.loads(path.read_bytes())["content"]
    content["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    path.write_text(json.dumps({"content": content, "sha256": content_sha256(content)}))
    with pytest.raises(CheckpointError, match="cannot be that of a checkpoint"):
        read_weights(run)


def test_a_link_in_a_checkpoint(run: Path) -> None:
    file = run / STEP / "__0_0.distcp"
    shutil.move(file, run / "elsewhere")
    file.symlink_to(run / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        read_weights(run)
    assert find_complete_checkpoint(run / "checkpoints")[0] is None


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_manifest_of_data(data: Path, name: str) -> None:
    for change in (
        lambda record: record["splits"]["train"]["shards"][0].update(name=name),
        lambda record: record["tokenizer"]["files"].update({name: "0" * 64}),
    ):
        record = json.loads((WRITTEN / "data" / "manifest.json").read_bytes())
        change(record)
        (data / "manifest.json").write_text(json.dumps(record))
        sign(data)
        with pytest.raises(DataError, match=f"{re.escape(repr(name))} is no name of a file in this folder"):
            load_manifest(data)


def link_out(path: Path, tmp_path: Path) -> None:
    """Move a file away, and put a link to it in its place."""
    secret = tmp_path / "secret"
    shutil.move(path, secret)
    path.symlink_to(secret)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer/tokenizer.model", "modeling_kraken.py"]
)
def test_links_in_an_export(export: Path, tmp_path: Path, name: str) -> None:
    link_out(export / name, tmp_path)
    for read in (read_export, complete_export):
        with pytest.raises(CheckpointError, match="which is outside of"):
            read(export)


@pytest.mark.parametrize("kind", ["qwen3", "transformers"])
def test_links_and_names_in_a_model_of_transformers(tmp_path: Path, kind: str) -> None:
    ARTEFACTS[kind](tmp_path / "model")
    config = TransformersConfig(str(tmp_path / "model"), str(tmp_path / "e"), None, "fp32")
    index = tmp_path / "model" / "model.safetensors.index.json"
    original = index.read_text()
    for name in NAMES:
        index.write_text(original.replace("model-00001-of-00002.safetensors", name))
        with pytest.raises(CheckpointError, match="not a file in the same folder"):
            import_transformers(config)
    index.write_text(original)
    link_out(tmp_path / "model" / "model-00001-of-00002.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="which is outside of"):
        import_transformers(config)


def test_the_cache_of_hugging_face_is_made_of_links(export: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(export, snapshot)
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert read_export(snapshot).config == read_export(export).config
    (snapshot / "more").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="which is outside of"):
        read_export(snapshot)


def test_a_copied_folder_takes_nothing_from_elsewhere(export: Path, tmp_path: Path) -> None:
    link_out(export / "tokenizer" / "tokenizer.model", tmp_path)
    with pytest.raises(PermissionError):
        copy_folder(export / "tokenizer", tmp_path / "copy")


def test_a_recorded_choice_names_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("# @package _global_\nmax_steps: 7\n")
    name = os.path.relpath(tmp_path / "evil", REPOSITORY / "conf" / "optim")
    settings = recorded_settings({"optim": {"name": name}})
    assert settings["max_steps"] != 7
    with pytest.raises(ConfigError, match=r"optim\.name=\[7\], which must be a name"):
        recorded_settings({"optim": {"name": [7]}})
    with pytest.raises(ConfigError, match=r"architecture=\{'a': 1\}, which must be a name"):
        recorded_model({"architecture": {"a": 1}})


# ---------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------


def safetensors_header(size: int, header: bytes = b"{}") -> bytes:
    return struct.pack("<Q", size) + header


@pytest.mark.parametrize(
    ("read", "name", "content"),
    [
        (read_export, "model.safetensors", safetensors_header(2 << 30)),
        (read_export, "model.safetensors", safetensors_header(2**64 - 1)),
        (lambda folder: Shard(folder / "train_00000"), "train_00000.idx", HEADER.pack(MAGIC, 1, 8, 2**31, 2**31)),
        (lambda folder: Shard(folder / "train_00000"), "train_00000.idx", HEADER.pack(MAGIC, 1, 8, 2**63, 2)),
        (load_tokenizer, "kraken_tokenizer.json", b"[" * 1_000_000),
        (load_manifest, "manifest.json", b'{"a":' * 1_000_000),
    ],
)
def test_sizes_that_a_header_claims(
    export: Path, data: Path, read: Callable[[Path], object], name: str, content: bytes
) -> None:
    for folder in (export, data):
        (folder / name).write_bytes(content)
        with pytest.raises(KrakenError):
            read(folder)


def test_a_model_that_its_weights_are_not(export: Path) -> None:
    """Its layers would be made one by one before a name is missing."""
    description = json.loads((export / "config.json").read_bytes())
    (export / "config.json").write_text(json.dumps({**description, "num_layers": 2**31 - 1}))
    with pytest.raises(CheckpointError, match=r"values, but its settings describe [\d,]+ parameters"):
        read_export(export)
    (export / "config.json").write_text(json.dumps({**description, "num_layers": 2**40}))
    with pytest.raises(CheckpointError, match="must be at most 2147483647"):
        read_export(export)


def test_data_and_its_manifest(data: Path) -> None:
    """The control: what is not changed is read."""
    assert verify_quick(data).tokens == 40258


# ---------------------------------------------------------------------------------------------------------------
# JSON and YAML
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, "[" * 100_000, '"\\ud800"', '["\\uD800"]', "{", "", "\xff"])
def test_refused_json(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (of whatever kind)
        parse_json(text)


def test_numbers_of_json() -> None:
    assert parse_json(str(2**64 - 1)) == 2**64 - 1
    assert parse_json("1" + "0" * 400) == float("inf")
    assert parse_json('"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize(
    "text", ["&a [*a]", "!!bool x", "!!timestamp x", "!!int x", "{? [a] : b}", "[" * 10_000, "a: b: c", "\x00", "*x"]
)
def test_refused_yaml(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (of whatever kind)
        parse_yaml(text)


def test_yaml_that_repeats_itself() -> None:
    levels = [
        f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    with pytest.raises(ValueError, match="repeats parts of itself"):
        parse_yaml(f"[&a [x], {', '.join(levels)}]")

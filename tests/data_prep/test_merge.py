"""Merged parts against one preparation of all their documents."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from data_helpers import make_texts, write_jsonl
from helpers import run_here, save_tokenizer, small_tokenizer, user_error

from data_prep.indexed import Shard
from data_prep.manifest import load_manifest
from data_prep.merge import merge
from data_prep.prepare import PrepareConfig, prepare
from data_prep.verify import verify
from kraken_train.common.errors import DataError
from kraken_train.common.settings import from_dict
from kraken_train.data.dataset import open_split

SPLITS = ("train", "validation")
PARTS = ("a", "b", "c")
TEXTS = make_texts(300)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`; `a`, `b` and `c`, made of a third of its documents each; `slice-1` to `slice-3`, made with slice=."""
    folder = tmp_path_factory.mktemp("prepared")
    save_tokenizer(small_tokenizer(), folder / "tokenizer")
    for name, texts in {"whole": TEXTS, "a": TEXTS[:100], "b": TEXTS[100:200], "c": TEXTS[200:]}.items():
        prepare_texts(folder, name, texts)
    for number in (1, 2, 3):
        prepare_slice(folder, f"{number}/3", folder / f"slice-{number}")
    return folder


def prepare_texts(folder: Path, name: str, texts: list[str], **changes: Any) -> Path:
    write_jsonl(folder / f"{name}.jsonl", texts)
    return prepare_file(folder, f"{name}.jsonl", folder / name, **changes)


def prepare_slice(folder: Path, text: str, output: Path, source: str = "whole.jsonl", **changes: Any) -> Path:
    return prepare_file(folder, source, output, slice=text, **changes)


def prepare_file(folder: Path, source: str, output: Path, **changes: Any) -> Path:
    settings = {
        "source": str(folder / source),
        "output_dir": str(output),
        "tokenizer": {"kind": "sentencepiece_model", "path": str(folder / "tokenizer" / "tokenizer.model")},
        "validation_fraction": 0.1,
        "shard_tokens": 3000,
    }
    prepare(from_dict(settings | changes, PrepareConfig))
    return output


def refused(*parts: Path, output: Path) -> str:
    message = user_error(run_here("data_prep.merge", *map(str, parts), "--output", str(output)))
    assert not output.exists()
    return message


def contents(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    verify(folder)
    return [line for line in capsys.readouterr().out.splitlines() if ", content " in line]


def test_reads_like_one_preparation(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_here("data_prep.merge", *(str(prepared / name) for name in PARTS), "--output", str(tmp_path / "all"))
    assert result.returncode == 0, result.stderr
    for split in SPLITS:
        whole, merged = open_split(prepared / "whole", split), open_split(tmp_path / "all", split)
        assert len(merged.shards) >= len(PARTS)
        assert merged.read(0, len(merged)).tolist() == whole.read(0, len(whole)).tolist()
    assert contents(tmp_path / "all", capsys) == contents(prepared / "whole", capsys)

    merged_manifest, manifest = load_manifest(tmp_path / "all"), load_manifest(prepared / "whole")
    for total in ("documents", "tokens", "text_bytes", "tokenizer", "dtype"):
        assert getattr(merged_manifest, total) == getattr(manifest, total)
    assert merged_manifest.fingerprint in result.stdout.splitlines()[-1]
    assert merged_manifest.fingerprint != manifest.fingerprint  # shards end elsewhere

    names = [entry.name for entry in merged_manifest.splits["train"].shards]
    assert names == [f"train_{number:05d}" for number in range(len(names))]


def test_links_the_shards(prepared: Path, tmp_path: Path) -> None:
    result = run_here("data_prep.merge", str(prepared / "a"), str(prepared / "b"), "--output", str(tmp_path / "ab"))
    count = len(list((prepared / "a").glob("*.bin")))
    assert f"{prepared / 'a'}: {count} shards linked" in result.stdout
    for suffix in ("bin", "idx"):
        assert (tmp_path / "ab" / f"train_00000.{suffix}").samefile(prepared / "a" / f"train_00000.{suffix}")


def test_copies_where_it_cannot_link(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linked = merge([prepared / "a", prepared / "b"], tmp_path / "linked")
    with mock.patch.object(os, "link", side_effect=OSError(errno.EXDEV, os.strerror(errno.EXDEV))):
        copied = merge([prepared / "a", prepared / "b"], tmp_path / "copied")
    assert "shards copied (invalid cross-device link)" in capsys.readouterr().out
    assert copied == linked
    assert not (tmp_path / "copied" / "train_00000.bin").samefile(prepared / "a" / "train_00000.bin")
    verify(tmp_path / "copied")


def test_a_damaged_file_is_not_copied(prepared: Path, tmp_path: Path) -> None:
    """Also where the probe of the quick check does not look."""
    part = shutil.copytree(prepared / "a", tmp_path / "part")
    path = part / "train_00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    cannot_link = mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, os.strerror(errno.EPERM)))
    with mock.patch("data_prep.merge.verify_quick", load_manifest), cannot_link:
        message = refused_by_merge(part, prepared / "b", output=tmp_path / "all")
    assert f"{path} has other content than manifest.json lists" in message
    assert os.listdir(tmp_path) == ["part"]


def refused_by_merge(*parts: Path, output: Path) -> str:
    with pytest.raises(DataError) as caught:
        merge(parts, output)
    return str(caught.value)


def test_the_order_given_is_the_order_of_the_documents(prepared: Path, tmp_path: Path) -> None:
    merge([prepared / "c", prepared / "a"], tmp_path / "ca")
    first = Shard(tmp_path / "ca" / "train_00000").document(0).tolist()
    assert first == Shard(prepared / "c" / "train_00000").document(0).tolist()


def test_slices_are_put_in_order(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slices = [prepared / f"slice-{number}" for number in (3, 1, 2)]
    assert run_here("data_prep.merge", *map(str, slices), "--output", str(tmp_path / "all")).returncode == 0
    assert contents(tmp_path / "all", capsys) == contents(prepared / "whole", capsys)
    merged, whole = load_manifest(tmp_path / "all"), load_manifest(prepared / "whole")
    assert merged.source == whole.source
    assert "slice" not in merged.request


def test_slices_of_a_trained_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each slice trains it on the whole source, so all have the same."""
    write_jsonl(tmp_path / "whole.jsonl", TEXTS)
    changes = {"tokenizer": {"kind": "sentencepiece", "vocab_size": 330}, "on_bad_record": "skip"}
    prepare_file(tmp_path, "whole.jsonl", tmp_path / "whole", **changes)
    slices = [prepare_slice(tmp_path, f"{number}/2", tmp_path / f"s{number}", **changes) for number in (1, 2)]
    merge(slices, tmp_path / "all")
    assert contents(tmp_path / "all", capsys) == contents(tmp_path / "whole", capsys)


def test_what_was_left_out_is_added_up(tmp_path: Path) -> None:
    save_tokenizer(small_tokenizer(), tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    broken = range(5, 300, 50)
    for number in broken:
        lines[number] = "{"
    (tmp_path / "whole.jsonl").write_text("\n".join(lines) + "\n")
    prepare_file(tmp_path, "whole.jsonl", tmp_path / "whole", on_bad_record="skip")
    for number in (1, 2, 3):
        prepare_slice(tmp_path, f"{number}/3", tmp_path / f"s{number}", on_bad_record="skip")
    merged = merge([tmp_path / f"s{number}" for number in (1, 2, 3)], tmp_path / "all")
    assert merged.skipped == load_manifest(tmp_path / "whole").skipped == {"the line is not JSON": len(broken)}
    parts = [load_manifest(tmp_path / f"s{number}") for number in (1, 2, 3)]
    assert merged.round_trips["checked"] == sum(part.round_trips["checked"] for part in parts)
    assert len(merged.skipped_places["the line is not JSON"]) == 3


def test_a_repeated_command_finds_its_result(prepared: Path, tmp_path: Path) -> None:
    merge([prepared / "a", prepared / "b"], tmp_path / "ab")
    before = (tmp_path / "ab" / "manifest.json").stat().st_mtime_ns
    merge([prepared / "a", prepared / "b"], tmp_path / "ab")
    assert (tmp_path / "ab" / "manifest.json").stat().st_mtime_ns == before
    assert "prepared by another request (merged is" in refused_by_merge(
        prepared / "b", prepared / "a", output=tmp_path / "ab"
    )


def test_an_interrupted_merge_leaves_nothing(prepared: Path, tmp_path: Path) -> None:
    parts = [prepared / "a", prepared / "b"]
    with (
        mock.patch("data_prep.manifest.Manifest.save", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        merge(parts, tmp_path / "ab")
    assert not (tmp_path / "ab").exists()
    merge(parts, tmp_path / "ab")
    verify(tmp_path / "ab")


def test_a_killed_merge_is_repeated(prepared: Path, tmp_path: Path) -> None:
    parts = [prepared / "a", prepared / "b"]
    killed = mock.patch("data_prep.manifest.Manifest.save", side_effect=KeyboardInterrupt)
    with killed, mock.patch("data_prep.output.shutil.rmtree"), pytest.raises(KeyboardInterrupt):  # nobody cleans up
        merge(parts, tmp_path / "ab")
    assert os.listdir(tmp_path) == [".ab.partial"]
    merge(parts, tmp_path / "ab")
    assert os.listdir(tmp_path) == ["ab"]
    verify(tmp_path / "ab")


def test_parts_that_do_not_belong_together(prepared: Path, tmp_path: Path) -> None:
    a, b, output = prepared / "a", prepared / "b", tmp_path / "all"
    same = shutil.copytree(a, tmp_path / "same")
    assert f"{same} holds the same data as {a}" in refused(a, b, same, output=output)
    assert "nowhere does not exist" in refused(a, tmp_path / "nowhere", output=output)

    other = prepare_texts(prepared, "other", make_texts(100, seed=1), validation_fraction=0.2)
    assert f"{other} was prepared with validation_fraction=0.2, but {a} with 0.1" in refused(a, other, output=output)

    trained = {"kind": "sentencepiece", "vocab_size": 330}
    other = prepare_texts(prepared, "trained", make_texts(100, seed=2), tokenizer=trained)
    message = refused(a, other, output=output)
    assert f"{other} was prepared with another tokenizer than {a} (kind=sentencepiece and not" in message


def test_duplicates_across_parts_are_told(tmp_path: Path) -> None:
    save_tokenizer(small_tokenizer(), tmp_path / "tokenizer")
    halves = {"a": TEXTS[:100], "b": TEXTS[50:150]}
    parts = [prepare_texts(tmp_path, name, texts, drop_duplicates=True) for name, texts in halves.items()]
    result = run_here("data_prep.merge", *map(str, parts), "--output", str(tmp_path / "all"))
    assert "duplicates were dropped within each part, not across parts" in result.stdout


def test_slices_that_do_not_belong_together(prepared: Path, tmp_path: Path) -> None:
    first, second, third = (prepared / f"slice-{number}" for number in (1, 2, 3))
    output = tmp_path / "all"
    assert "1 of 3 slices are missing: 3/3" in refused(first, second, output=output)
    assert "2 of 3 slices are missing: 2/3, 3/3" in refused(first, output=output)
    again = shutil.copytree(first, tmp_path / "again")
    assert f"{again} and {first} are both slice 1/3" in refused(first, second, again, output=output)
    quarter = prepare_slice(prepared, "2/4", tmp_path / "quarter")
    assert f"{quarter} is slice 2/4, but {first} is slice 1/3" in refused(first, quarter, output=output)
    whole = prepared / "b"
    assert f"{whole} is a whole preparation, but {first} is slice 1/3" in refused(whole, first, output=output)

    write_jsonl(prepared / "other-source.jsonl", make_texts(300, seed=3))
    other = prepare_slice(prepared, "3/3", tmp_path / "other", source="other-source.jsonl")
    assert f"{other} is a slice of another source than {first}" in refused(first, second, other, output=output)
    stricter = prepare_slice(prepared, "3/3", tmp_path / "stricter", min_length=20)
    assert f"{stricter} was prepared with min_length=20, but {first} with 1" in refused(
        first, second, stricter, output=output
    )
    merge([first, second, third], output)

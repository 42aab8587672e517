"""What a source folder gives: links are followed, each file is read once, and nothing is left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_helpers import write_jsonl

from data_prep.documents import BadRecords
from data_prep.files import FilesSource
from data_prep.listing import list_folder
from data_prep.output import finished_result
from data_prep.prepare import PrepareConfig, prepare
from data_prep.sources import SourceSettings, open_source
from kraken_train.common.errors import DataError
from kraken_train.common.files import real_path
from kraken_train.common.settings import from_dict


def texts(path: Path) -> list[str]:
    return [document.text for document in FilesSource(path, "text").documents(BadRecords("fail"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`source/a.txt`, and beside it `other/deep/b.txt`."""
    for name in ("source/a.txt", "other/deep/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "source"


def test_linked_folders_and_files_are_read(folder: Path) -> None:
    (folder / "z").symlink_to("../other")
    (folder / "c.txt").symlink_to(folder.parent / "other" / "deep" / "b.txt")
    listing = list_folder(folder, (".txt",))
    assert [str(path.relative_to(folder)) for path in listing.files] == ["a.txt", "c.txt"]
    assert listing.notes() == [
        f"left out 1 entry of the source: links to what is read under another name ({folder}/z/deep/b.txt)"
    ]
    assert texts(folder) == ["source/a.txt", "other/deep/b.txt"]


def test_a_name_without_a_link_is_preferred(folder: Path) -> None:
    (folder / "0.txt").symlink_to("a.txt")
    (folder / "0").symlink_to(".", target_is_directory=False)
    with pytest.raises(DataError, match=rf"{folder}/0 is a link to {folder}, which contains it; remove the link"):
        texts(folder)
    (folder / "0").unlink()
    assert list_folder(folder, (".txt",)).files == [folder / "a.txt"]


def test_a_circle_through_other_folders_is_named(folder: Path) -> None:
    (folder / "z").symlink_to("../other")
    (folder.parent / "other" / "deep" / "back").symlink_to("../../source")
    with pytest.raises(DataError, match=r"source/z/deep/back is a link to .*/source, which contains it"):
        texts(folder)


def test_a_folder_linked_twice_is_no_circle(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / name).symlink_to("../other")
    assert texts(folder) == ["source/a.txt", "other/deep/b.txt"]


@pytest.mark.parametrize("name", ["gone.txt", "gone"])
def test_links_to_nothing_are_named(folder: Path, name: str) -> None:
    (folder / name).symlink_to("/nowhere")
    for source in (folder, folder / name):
        with pytest.raises(DataError, match=rf"{name} is a link to /nowhere, which does not exist"):
            open_source(SourceSettings(str(source)))
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    for source in (folder, folder / name):
        with pytest.raises(DataError, match=rf"{name} is a link to {name}, which leads around in a circle"):
            open_source(SourceSettings(str(source)))


def test_an_output_folder_in_a_circle_of_links_is_named(folder: Path) -> None:
    (folder / "out").symlink_to("out")
    with pytest.raises(DataError, match=r"output_dir=.*/out is a link to out, which leads around in a circle"):
        finished_result(real_path(folder / "out"), {})


@pytest.mark.timeout(60)
def test_pipes_are_named_and_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "p.txt")
    for source in (folder, folder / "p.txt"):
        with pytest.raises(DataError, match=r"source=.*p.txt is a named pipe, not a file"):
            open_source(SourceSettings(str(source)))


def test_a_folder_that_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if path == folder / "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"source: .*/closed cannot be listed: Permission denied"):
        texts(folder)


def test_a_link_with_an_ending_to_a_file_without(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face Hub."""
    (tmp_path / "blob").write_text("text")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.txt").symlink_to("../blob")
    assert texts(tmp_path / "snapshot") == texts(tmp_path / "snapshot" / "a.txt") == ["text"]


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "a.jsonl", ["one", "two"])
    for number in range(8):
        (source / f"{number}.csv").write_text("x")
    settings = {
        "source": str(source),
        "output_dir": str(tmp_path / "data"),
        "validation_fraction": 0.0,
        "num_workers": 0,
        "tokenizer": {"kind": "sentencepiece_model", "path": str(tokenizer_dir / "tokenizer.model")},
    }
    prepare(from_dict(settings, PrepareConfig))
    note = "note: left out 8 entries of the source: of no kind that is read"
    assert f"{note} ({source}/0.csv, {source}/1.csv, {source}/2.csv, ...)\n" in capsys.readouterr().out

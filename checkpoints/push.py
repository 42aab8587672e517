"""Uploads an export to the Hugging Face Hub: python -m checkpoints.push export_dir=EXPORT repo=ORG/NAME

Only the files of the export are uploaded. The token is that of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from checkpoints.exports.checksums import require_unchanged
from checkpoints.exports.folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    MODELING_FILE,
    read_description,
    read_export,
)
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.free_text import FilePath, Name

CARD_FILE = "README.md"
COMMIT_MESSAGE = "Upload an export of kraken-train"


@dataclass(frozen=True)
class PushConfig:
    """See conf/push.yaml."""

    export_dir: FilePath  # folder that checkpoints.export has written
    repo: Name  # ORG/NAME; it is created if it does not exist
    private: bool  # visibility of a repository that is created
    dry_run: bool  # print what would be uploaded, and upload nothing

    def validate(self) -> None:
        """Raises ConfigError."""
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ConfigError(f"repo={self.repo} is not a repository's name ({error}); use ORG/NAME") from error
        if self.repo.count("/") != 1:
            raise ConfigError(f"repo={self.repo} has no user or organization; use ORG/NAME")


def push(config: PushConfig) -> None:
    """Upload the export.

    Raises CheckpointError if the export is incomplete or the upload fails, ConfigError if there is no token.
    """
    folder = Path(config.export_dir)
    files = complete_export(folder)
    visibility = "private" if config.private else "public"
    size = sum((folder / name).stat().st_size for name in files)
    print(f"{'would upload' if config.dry_run else 'uploading'} {len(files)} files, {readable(size)}, to {config.repo}")
    for name in files:
        print(f"  {readable((folder / name).stat().st_size):>10}  {name}")
    if CARD_FILE not in files:
        print(f"note: {folder} has no {CARD_FILE}, so the Hub will show no model card")
    if config.dry_run:
        print(f"{config.repo} would be created, {visibility}, if it does not exist; nothing has been uploaded")
        return
    if get_token() is None:
        raise ConfigError("there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=config.repo, folder_path=folder, allow_patterns=files, commit_message=COMMIT_MESSAGE
        )
    except Exception as error:  # the errors of the HTTP client depend on the version of the library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{config.repo} could not be written: {reason}; check the network, the repository's name and the token's "
            "rights, then start the same command again"
        ) from error
    print(f"uploaded: {commit.commit_url}")


def complete_export(folder: Path) -> list[str]:
    """The names of the files. Raises CheckpointError if one is damaged or one that transformers needs is missing."""
    export = read_export(folder)
    for name in [MODELING_FILE.name, *([GENERATION_FILE] if export.tokenizer_dir.is_dir() else [])]:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} lacks {name}, which transformers needs; export again with this version of the program"
            )
    if "auto_map" not in read_description(folder / CONFIG_FILE):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has no auto_map, which transformers needs; export again with this version of the "
            "program"
        )
    if export.tokenizer_dir.is_dir():
        export.load_tokenizer()  # raises CheckpointError if it is damaged
    require_unchanged(folder)
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith((".", "__")) for part in path.parts))


def readable(size: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def main() -> None:
    run_entry(push, PushConfig, "push")


if __name__ == "__main__":
    main()

"""A hook of mkdocs that makes a page for each command from the program itself, so that no page is out of date.

A command with Hydra is described by its dataclass (`kraken_train.common.setting_docs`) and by the defaults in conf/,
any other by its own `--help`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import hydra
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf

from kraken_train.common.cli import CONF_DIR
from kraken_train.common.setting_docs import SettingDoc, describe
from kraken_train.common.settings import OneOf, choices_of, field_types

ROOT = CONF_DIR.parent
PACKAGES = ("data_prep", "kraken_train", "checkpoints", "launch")
# Programs that other commands start.
INTERNAL = (
    "kraken_train.bench.stages.program",
    "kraken_train.bench.stages.without_cudnn",
    "kraken_train.common.locales",
    "launch.node",
    "launch.restart",
    "launch.slurm.snapshot",
)
SECTIONS = {  # title in the navigation -> how the names of its commands begin
    "Data": ("data_prep.",),
    "Training": ("kraken_train.train", "kraken_train.status", "kraken_train.report", "kraken_train.plan",
                 "kraken_train.derive", "kraken_train.tracking.", "checkpoints.inspect"),
    "Launching": ("launch.",),
    "Exports": ("checkpoints.", "kraken_train.evaluate", "kraken_train.generate"),
    "Benchmarks": ("kraken_train.bench.",),
}  # fmt: skip
CHOICES_PAGE = "commands/choices.md"
MISSING = "???"  # Hydra's mark of a setting that must be given
BY_FILE = object()  # in place of a default: each file of the group sets it
LONGEST_DEFAULT = 60  # characters in a table


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages to the navigation."""
    pages: dict[str, list[dict[str, str]]] = {title: [] for title in SECTIONS}
    for command in commands():
        title = next(title for title, starts in SECTIONS.items() if command.startswith(starts))
        pages[title].append({command: page_of(command)})
    entry = next(item["Commands"] for item in config.nav or [] if "Commands" in item)
    entry[1:] = [{title: found} for title, found in pages.items()] + [{"Files of conf/": CHOICES_PAGE}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for command in commands():
        files.append(File.generated(config, page_of(command), content=command_page(command)))
    files.append(File.generated(config, CHOICES_PAGE, content=choices_page()))
    return files


def commands() -> list[str]:
    """All modules that are started by `python -m`, but for those that only other commands start."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if name not in INTERNAL and '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                found.append(name)
    return found


def page_of(command: str) -> str:
    return f"commands/{command}.md"


def command_page(command: str) -> str:
    source = (ROOT / (command.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    tree = ast.parse(source)
    parts = [f"# {command}", usage(ast.get_docstring(tree) or "")]
    entry = hydra_entry(tree)
    if entry is None and "argparse" in source:
        parts += ["## Arguments", code(help_text(command))]
    if entry is not None:
        schema, config_name = entry
        parts += [
            "## Settings",
            f"Give them as `key=value` ([how](index.md#settings)). `conf/{config_name}.yaml` has the defaults.",
            *settings_sections(getattr(importlib.import_module(command), schema), config_name),
        ]
    return "\n\n".join(parts) + "\n"


def usage(docstring: str) -> str:
    """The docstring as Markdown: a command at the end of its first line becomes a block of code."""
    first, _, rest = docstring.partition("\n")
    found = re.fullmatch(r"(.*?):? `?(python -m [^`]*)`?(.*)", first)
    if found is None:
        return docstring
    text, line, more = found.groups()
    return f"{text}{more or '.'}\n\n{code(line)}\n{rest}".rstrip()


def code(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def hydra_entry(tree: ast.Module) -> tuple[str, str] | None:
    """The names of the dataclass and of the file in conf/ that a command hands to `run_entry`, if it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_entry":
            return ast.unparse(node.args[1]), ast.literal_eval(node.args[2])
    return None


def help_text(command: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "TERM": "dumb", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    if result.returncode:
        raise RuntimeError(f"python -m {command} --help has failed: {result.stderr}")
    return result.stdout


def settings_sections(schema: type, config_name: str) -> list[str]:
    """A table of the settings, one for each group of settings within them, and one of the files to choose from."""
    defaults, groups, docs = composed_defaults(config_name), chosen_groups(config_name), describe(schema)
    kinds = field_types(schema, include_extras=True)
    simple = [name for name in kinds if name in docs]
    order = [*defaults, *(name for name in simple if name not in defaults)]  # no file is chosen for the latter
    parts = [table({name: defaults.get(name) for name in sorted(simple, key=order.index)}, docs)]
    for name in (name for name in kinds if name not in docs):
        for title, part in nested_schemas(name, kinds[name]).items():
            values = defaults.get(name) if title == name else file_of_choice(name, title)
            values = values or dict.fromkeys(field_types(part), BY_FILE)  # where no file is chosen by default
            parts += [f"### {title}", *introduction(part)]
            parts.append(table({f"{name}.{key}": value for key, value in values.items()}, describe(part, f"{name}.")))
    if groups:
        parts += ["### Files to choose from", groups_table(groups)]
    return parts


def composed_defaults(config_name: str) -> dict[str, Any]:
    """The settings that a command has without arguments; MISSING for those that must be given."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        settings = OmegaConf.to_container(hydra.compose(config_name), resolve=False, throw_on_missing=False)
    return {str(key): value for key, value in typing.cast(dict[Any, Any], settings).items()}


def nested_schemas(name: str, kind: Any) -> dict[str, type]:
    """The dataclasses that describe the settings within a setting, by the title of their section."""
    if dataclasses.is_dataclass(kind):
        return {name: typing.cast(type, kind)}
    if choices := choices_of(kind):
        return {f"{name}={choice}": schema for choice, schema in choices.items()}
    (mark,) = (mark for mark in kind.__metadata__ if isinstance(mark, OneOf))
    return {f"{name}: {schema.__name__.removesuffix('Config')}": schema for schema in mark.schemas}


def file_of_choice(group: str, title: str) -> dict[str, Any]:
    """The values of the file that belongs to one of several dataclasses: conf/GROUP/NAME.yaml or conf/GROUP/base/."""
    name = title.replace(":", "=").rpartition("=")[2].strip()
    paths = (CONF_DIR / group / f"{name}.yaml", CONF_DIR / group / "base" / f"{name.lower()}.yaml")
    values = yaml.safe_load(next(path for path in paths if path.is_file()).read_text(encoding="utf-8"))
    return {key: BY_FILE if value == MISSING else value for key, value in values.items()}


def introduction(schema: type) -> list[str]:
    written = schema.__doc__ or ""
    return [] if written.startswith(f"{schema.__name__}(") else [inspect.cleandoc(written)]  # not dataclass's own


def table(defaults: dict[str, Any], docs: dict[str, SettingDoc]) -> str:
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, default in defaults.items():
        cells = (f"`{name}`", docs[name].type, default_text(default), in_table(docs[name].description))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def in_table(text: str) -> str:
    """Braces and angle brackets outside of code would be read as attributes and tags."""
    parts = text.split("`")
    parts[::2] = [part.replace("{", "&#123;").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def default_text(default: Any) -> str:
    if default is BY_FILE or (isinstance(default, str) and len(default) > LONGEST_DEFAULT):
        return "by the chosen file"
    if default == MISSING:
        return "required"
    return f"`{default if isinstance(default, str) and default else json.dumps(default)}`"


def chosen_groups(config_name: str) -> dict[str, str | None]:
    """The groups of conf/ that a command takes settings from, with the file that is chosen by default."""
    defaults = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    entries = [entry for entry in defaults if isinstance(entry, dict)]  # the others are "_self_"
    return {name: choice for entry in entries for name, choice in entry.items() if (CONF_DIR / name).is_dir()}


def groups_table(groups: dict[str, str | None]) -> str:
    rows = ["| | default | files |", "| --- | --- | --- |"]
    for group, choice in groups.items():
        links = [f"[{path.stem}](choices.md#{anchor(path)})" for path in files_of(group) if path.parent.name == group]
        rows.append(f"| `{group}=NAME` | {'none' if choice is None else f'`{choice}`'} | {', '.join(links)} |")
    return "\n".join(rows)


def files_of(group: str) -> list[Path]:
    """Those of a folder of conf/; what they share (`base/`) comes last."""
    return sorted((CONF_DIR / group).rglob("*.yaml"), key=lambda path: (path.parent.name != group, path.name))


def anchor(path: Path) -> str:
    return "-".join(path.relative_to(CONF_DIR).with_suffix("").parts).replace(".", "")


def choices_page() -> str:
    parts = [
        "# Files of conf/",
        "Each folder in `conf/` is a group of settings, and each file in it a choice. `GROUP=NAME` takes all settings "
        "of a file, and `GROUP.KEY=VALUE` changes one of them.",
    ]
    for group in sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir()):
        parts.append(f"## {group}")
        for path in files_of(group):
            name = path.relative_to(CONF_DIR / group).with_suffix("").as_posix()
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
            head = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
            parts.append(f"### {group}{'/' if '/' in name else '='}{name} {{#{anchor(path)}}}")
            parts += [" ".join(line.lstrip("# ") for line in lines[:head])] if head else []
            parts.append("```yaml\n" + "\n".join(lines[head:]).strip() + "\n```")
    return "\n\n".join(parts) + "\n"

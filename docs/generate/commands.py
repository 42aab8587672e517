"""A hook of mkdocs that makes a page for each command from the program itself, so that no page is out of date.

A command with Hydra is described by its dataclass and by conf/ (`settings.py`), any other by its own `--help`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # before the imports of what is there

from settings import (  # noqa: E402
    CONF,
    MISSING,
    all_comments,
    choices,
    chosen_groups,
    composed_defaults,
    field_default,
    meaning,
    nested_schemas,
    ordered_fields,
    type_name,
)

PACKAGES = ("data_prep", "kraken_train", "checkpoints", "launch")
# Programs that other commands start.
INTERNAL = ("kraken_train.common.locales", "launch.node", "launch.restart", "launch.slurm.snapshot")
SECTIONS = {  # title in the navigation -> how the names of its commands begin
    "Data": ("data_prep.",),
    "Training": ("kraken_train.train", "kraken_train.status", "kraken_train.report", "kraken_train.plan",
                 "kraken_train.derive", "kraken_train.tracking.", "checkpoints.inspect"),
    "Launching": ("launch.",),
    "Exports": ("checkpoints.", "kraken_train.evaluate", "kraken_train.generate"),
    "Benchmarks": ("kraken_train.bench.",),
}  # fmt: skip
CHOICES_PAGE = "commands/choices.md"
CHOSEN = object()  # in place of a default: it is in the file that is chosen for the group


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
    return f"{text}{more or '.'}\n\n{code(line)}\n{rest}"


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
    defaults, comments, groups = composed_defaults(config_name), all_comments(config_name), chosen_groups(config_name)
    top: list[str] = []
    sections: list[str] = []
    for name, kind in ordered_fields(schema, defaults).items():
        nested = nested_schemas(kind)
        if not nested:
            default = defaults.get(name, field_default(schema, name))
            top.append(row(name, kind, default, meaning(schema, name, "", comments)))
        for part in nested:
            title = name if len(nested) == 1 else f"{name}, {spaced(part.__name__)}"
            sections += [f"### {title}", *introduction(part)]
            values = None if name in groups and len(nested) > 1 else defaults.get(name) or {}
            sections.append(nested_table(name, part, values, comments))
    return [table(top), *sections, *groups_section(groups)]


def spaced(name: str) -> str:
    """`KrakenConfig` as "Kraken"."""
    return name.removesuffix("Config").removesuffix("Settings")


def introduction(schema: type) -> list[str]:
    written = schema.__doc__ or ""
    return [] if written.startswith(f"{schema.__name__}(") else [inspect.cleandoc(written)]  # not dataclass's own


def nested_table(group: str, schema: type, defaults: dict[str, Any] | None, comments: dict[str, str]) -> str:
    """The settings of a dataclass within another; without `defaults` they are those of the chosen file."""
    rows = []
    for name, kind in ordered_fields(schema, defaults or {}).items():
        default = CHOSEN if defaults is None else defaults.get(name, field_default(schema, name))
        known = {} if defaults is None else comments  # these are of the file that is chosen by default
        rows.append(row(f"{group}.{name}", kind, default, meaning(schema, name, f"{group}.", known)))
    return table(rows)


def table(rows: list[str]) -> str:
    return "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def row(name: str, kind: Any, default: Any, text: str) -> str:
    cells = (f"`{name}`", type_name(kind), default_text(default), text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_text(default: Any) -> str:
    if default is CHOSEN:
        return "that of the chosen file"
    if default == MISSING:
        return "required"
    return f"`{default if isinstance(default, str) and default else json.dumps(default, default=list)}`"


def groups_section(groups: dict[str, str | None]) -> list[str]:
    rows = [
        f"| `{group}=NAME` | {'none' if choice is None else f'`{choice}`'} | "
        + ", ".join(f"[{name}](choices.md#{group}-{name.replace('.', '')})" for name in choices(group))
        + " |"
        for group, choice in groups.items()
    ]
    return (
        ["### Files to choose from", "\n".join(["| | default | files |", "| --- | --- | --- |", *rows])] if rows else []
    )


def choices_page() -> str:
    parts = [
        "# Files of conf/",
        "Each folder in `conf/` is a group of settings, and each file in it a choice. `GROUP=NAME` takes all settings "
        "of a file, and `GROUP.KEY=VALUE` changes one of them.",
    ]
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        parts.append(f"## {group}")
        for name in choices(group):
            lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if not line.startswith("# @")]
            head = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
            parts.append(f"### {group}={name} {{#{group}-{name.replace('.', '')}}}")
            parts += [" ".join(line.lstrip("# ") for line in lines[:head])] if head else []
            parts.append("```yaml\n" + "\n".join(lines[head:]).strip() + "\n```")
    return "\n\n".join(parts) + "\n"

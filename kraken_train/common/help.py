"""`--help` and `--version` of all commands."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

from kraken_train import __version__
from kraken_train.common.setting_docs import describe

VERSION = f"kraken-train {__version__}"
HELP_OPTIONS, VERSION_OPTION = {"-h", "--help"}, "--version"
WIDTH, INDENT = 100, 4
LONGEST_DEFAULT = 60  # characters


def command_name() -> str:
    """How this command is called: `kraken-train`, or `python -m kraken_train.train`."""
    program = Path(sys.argv[0])
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if program.suffix != ".py" or spec is None:
        return program.name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser for a command without Hydra, described by `doc`, the docstring of its module."""
    parser = argparse.ArgumentParser(
        prog=command_name(), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(VERSION_OPTION, action="version", version=VERSION)
    return parser


def answer_help(arguments: list[str], doc: str | None, schema: type, config_file: Path) -> None:
    """Print the help or the version if `arguments` ask for it, and exit.

    `doc` is the docstring of the command's module, `schema` the dataclass of its settings, `config_file` has defaults.
    """
    if VERSION_OPTION in arguments:
        print(VERSION)
        sys.exit()
    if HELP_OPTIONS & set(arguments):
        print(describe_command(doc, schema, config_file))
        sys.exit()


def describe_command(doc: str | None, schema: type, config_file: Path) -> str:
    """What a command with Hydra does, its groups of settings, and its settings with defaults and meanings."""
    defaults = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    groups = {key: choice for entry in defaults.get("defaults", []) if isinstance(entry, dict)
              for key, choice in entry.items() if "hydra" not in key}  # fmt: skip
    lines = [f"usage: {command_name()} [--help] [--version] [--cfg job] SETTING=VALUE ...", "", (doc or "").strip(), ""]
    if groups:
        lines.append("Groups of settings, chosen by NAME=FILE:")
        for group, choice in groups.items():
            files = sorted(path.stem for path in (config_file.parent / group).glob("*.yaml"))
            lines += entry(f"{group}={'null' if choice is None else choice}", f"one of {', '.join(files)}")
        lines.append("")
    lines.append("Settings, with their defaults (??? must be given):")
    for name, doc_of in describe(schema).items():
        group = name.partition(".")[0]
        if group in groups and group not in {field.name for field in dataclasses.fields(schema)}:
            continue
        lines += entry(f"{name}{default_of(name, defaults)}", doc_of.description)
    lines += ["", f"`{command_name()} SETTING=VALUE ... --cfg job` prints all settings with their values."]
    return "\n".join(lines)


def default_of(name: str, defaults: dict[str, Any]) -> str:
    value: Any = defaults
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return ""  # a group's file sets it
        value = value[key]
    if isinstance(value, str):
        return f"={value}"
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()
    return f"={shown}" if len(shown) <= LONGEST_DEFAULT else ""


def entry(head: str, text: str) -> list[str]:
    indent = " " * INDENT
    return [f"  {head}", *textwrap.wrap(text, WIDTH, initial_indent=f"{indent}  ", subsequent_indent=f"{indent}  ")]

"""A hook of mkdocs that makes the pages of the API, one for each folder of the packages, and takes in CHANGELOG.md,
CONTRIBUTING.md and SECURITY.md.

Folders and modules are found, not listed, so that a new one is documented without a change here.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kraken_train", "data_prep", "checkpoints", "launch")
TEXTS = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages to the navigation."""
    reference = next(item["Reference"] for item in config.nav or [] if "Reference" in item)
    entry = next(item for item in reference if "API" in item)
    entry["API"] = [{room: page_of(room)} for room in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for room, modules in rooms().items():
        files.append(File.generated(config, page_of(room), content=room_page(room, modules)))
    for page, name in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def page_of(room: str) -> str:
    return f"api/{room}.md"


def rooms() -> dict[str, list[str]]:
    """The folders that hold modules, such as `kraken_train.model`, and the names of these."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return found


def room_page(room: str, modules: list[str]) -> str:
    parts = [f"# {room}", table_of(modules)]
    for module in modules:
        elsewhere = sorted(reexported_names(syntax_of(module)))  # shown where they are defined
        filters = ["!^_", *(f"!^{name}$" for name in elsewhere)]
        parts.append(f"::: {module}\n    options:\n      filters: {json.dumps(filters)}")
    return "\n\n".join(parts) + "\n"


def syntax_of(module: str) -> ast.Module:
    return ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def reexported_names(tree: ast.Module) -> set[str]:
    """What a module imports and lists in `__all__`."""
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    return imported & {name for names in lists for name in ast.literal_eval(names)}


def table_of(modules: list[str]) -> str:
    """What each module is about: the first line of its docstring."""
    rows = []
    for module in modules:
        first = (ast.get_docstring(syntax_of(module)) or "").partition("\n")[0].replace("|", "\\|")
        rows.append(f"| [`{module.rpartition('.')[2]}`](#{module}) | {first} |")
    return "\n".join(["| module | about |", "| --- | --- |", *rows])

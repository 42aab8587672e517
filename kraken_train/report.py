"""Draws curves of training runs as a PNG, and compares several runs in a table.

    python -m kraken_train.report RUN_DIR [--norms]
    python -m kraken_train.report RUN_OR_EXPORT RUN_OR_EXPORT ... [--output FILE.png] [--table FILE.md|FILE.json]

It reads the metrics that runs logged and the results that evaluations recorded in exports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from kraken_train.reporting.curves import draw_curves
from kraken_train.reporting.norms_figure import draw_norms
from kraken_train.run.metrics import read_run

CURVES_FILE, NORMS_FILE = "curves.png", "norms.png"


def compare(paths: Sequence[Path], output: Path, table: Path | None) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from kraken_train.evaluation.results import markdown_table  # noqa: PLC0415

    # Imported here, because they take seconds and the curves of one run do not need them.
    from kraken_train.reporting import comparison  # noqa: PLC0415
    from kraken_train.reporting.comparison_figure import draw_comparison  # noqa: PLC0415

    entries = [comparison.read_entry(path) for path in paths]
    entries = [
        replace(entry, label=label, run=replace(entry.run, label=label))
        for entry, label in zip(entries, comparison.unique_labels(entries, paths), strict=True)
    ]
    tables = [("", comparison.HEADER, comparison.rows(entries))]
    for suite in comparison.compare_suites(entries).values():
        tables.append((suite.title, *comparison.suite_table(suite)))  # type: ignore[arg-type]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for title, header, rows in tables:
        printed = Table(*header, title=title or None, title_justify="left")
        for column in printed.columns[1:]:
            column.justify = "right"
        for row in rows:
            printed.add_row(*row)
        console.print(printed, markup=False)
    for note in comparison.notes(entries):
        console.print(note, markup=False)
    if table is not None:
        if table.suffix == ".json":
            text = comparison.to_json(entries)
        else:
            parts = [f"{f'**{title}**' if title else ''}\n\n{markdown_table(h, r)}" for title, h, r in tables]
            text = "\n\n".join([*parts, *comparison.notes(entries)]).lstrip() + "\n"
        table.write_text(text, encoding="utf-8")
        print(f"wrote {table}")
    draw_comparison(entries, output)
    print(f"wrote {output}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a training run, or export")
    parser.add_argument(
        "--norms", action="store_true", help="draw sizes of weights, updates and activations by layer, of one run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="PNG file to write; default: RUN_DIR/curves.png or norms.png, or ./curves.png for several runs",
    )
    parser.add_argument(
        "--table", type=Path, help="file for the comparison: *.json for JSON, any other name for Markdown"
    )
    options = parser.parse_args(arguments)
    only_one = len(options.run_dirs) == 1
    file = NORMS_FILE if options.norms else CURVES_FILE
    output = options.output or (options.run_dirs[0] / file if only_one else Path(file))
    with user_errors(output):
        if options.norms:
            if not only_one or options.table is not None:
                raise ConfigError("--norms draws one run and has no table; name one RUN_DIR, without --table")
            draw_norms(read_run(options.run_dirs[0]), output)
            print(f"wrote {output}")
        elif only_one and options.table is None:
            draw_curves([read_run(options.run_dirs[0])], output)
            print(f"wrote {output}")
        else:
            compare(options.run_dirs, output, options.table)


if __name__ == "__main__":
    main()

"""Write the tables of the SpidR paper as Markdown, LaTeX (booktabs) and CSV; takes a second.

    python paper/tables.py [--only NAME …] [--output DIR] [--reproduced FILE …]

They cover ABX error of features and of units, unit quality, spoken language models, SUPERB and pretraining time. The
best value of each column is bold, and listed below the table (in CSV: in the column "best"). With a results.csv of
paper/reproduce.py, each published value has the reproduced one beside it.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write
from spidr.tools.lazy import command_needs

with command_needs("paper", __name__):
    import polars as pl
    from published import BEST_LAYER, KEYS, METRICS, MODELS, REPRESENTATIONS, SCHEMA, pretraining_hours, results

LOWER_IS_BETTER = {"abx", "per", "asr"}
NO_BEST = {"codebook_perplexity", "active_codewords", "bitrate"}
DECIMALS = {
    "abx": 2,
    "map": 2,
    "pnmi": 3,
    "phone_purity": 3,
    "cluster_purity": 3,
    "codebook_perplexity": 1,
} | dict.fromkeys(("swuggy_all", "swuggy_invocab", "sblimp", "tsc", "ssc", "bitrate"), 1)
ROW_KEYS = ["model", "representation", "num_units", "layer", "lm_hours"]


@dataclass
class Column:
    """Values of one measure, one per row; None if missing."""

    name: str
    values: list[float | None]
    decimals: int
    best: str = ""
    """"min", "max", or "" if neither is better."""
    topline: frozenset[int] = frozenset()
    """Rows that do not compete."""

    def best_rows(self) -> set[int]:
        """Rows with the best value, as printed."""
        printed = [None if value is None else round(value, self.decimals) for value in self.values]
        present = {row: value for row, value in enumerate(printed) if value is not None and row not in self.topline}
        if not self.best or not present:
            return set()
        best = min(present.values()) if self.best == "min" else max(present.values())
        return {row for row, value in present.items() if value == best}

    def text(self, row: int) -> str:
        """The value of a row as printed."""
        value = self.values[row]
        return "" if value is None else f"{value:.{self.decimals}f}"


@dataclass
class Table:
    """A table: labels of the rows, then the measures."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    columns: list[Column]

    def best(self) -> list[tuple[str, str, str]]:
        """Name, best value, and the rows that reach it, for each measure that has a best value."""
        found = []
        for column in self.columns:
            rows = sorted(column.best_rows())
            if rows:
                who = " and ".join(self._describe(self.rows[row]) for row in rows)
                found.append((column.name, column.text(rows[0]), who))
        return found

    def _describe(self, cells: Sequence[str]) -> str:
        units = {
            "Units": "{} units",
            "Layer": "layer {}",
            "LM hours": "{} h",
            "GPUs": "{} GPUs",
            "Compiled": "compiled: {}",
        }
        return ", ".join(
            units.get(head, "{}").format(cell) for head, cell in zip(self.heads, cells, strict=True) if cell
        )

    def cells(self, bold: Callable[[str], str]) -> list[list[str]]:
        """All rows as text, with ``bold`` applied to the best values."""
        best = [column.best_rows() for column in self.columns]
        return [
            [
                *labels,
                *(
                    bold(c.text(row)) if row in rows else c.text(row)
                    for c, rows in zip(self.columns, best, strict=True)
                ),
            ]
            for row, labels in enumerate(self.rows)
        ]

    def markdown(self) -> str:
        """As Markdown, with a list of the best values."""
        heads = [*self.heads, *(column.name for column in self.columns)]
        cells = self.cells(lambda text: f"**{text}**")
        widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
        rule = ["-" * width if i < len(self.heads) else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

        def line(row: Sequence[str]) -> str:
            aligned = [
                text.ljust(width) if i < len(self.heads) else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            return f"| {' | '.join(aligned)} |\n"

        best = "".join(f"- {name}: {value} ({who})\n" for name, value, who in self.best())
        return f"# {self.title}\n\n{line(heads)}{line(rule)}{''.join(map(line, cells))}\nBest:\n\n{best}"

    def latex(self) -> str:
        """As a LaTeX table for booktabs."""
        heads = [*self.heads, *(column.name for column in self.columns)]
        lines = [" & ".join(map(_escape, heads))]
        escaped = Table(self.title, heads, [[_escape(cell) for cell in row] for row in self.rows], self.columns)
        lines += [" & ".join(row) for row in escaped.cells(lambda text: rf"\textbf{{{text}}}")]
        head, *body = [f"    {line} \\\\\n" for line in lines]
        best = "".join(f"% best {name}: {value} ({who})\n" for name, value, who in self.best())
        return (
            f"{best}\\begin{{table}}\n  \\centering\n  \\caption{{{_escape(self.title)}}}\n"
            f"  \\begin{{tabular}}{{{'l' * len(self.heads)}{'r' * len(self.columns)}}}\n    \\toprule\n{head}"
            f"    \\midrule\n{''.join(body)}    \\bottomrule\n  \\end{{tabular}}\n\\end{{table}}\n"
        )

    def csv(self) -> str:
        """As CSV; the column "best" names the measures in which a row is best."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*self.heads, *(column.name for column in self.columns), "best"])
        for row, cells in enumerate(self.cells(str)):
            writer.writerow([*cells, "; ".join(c.name for c in self.columns if row in c.best_rows())])
        return out.getvalue()


def _escape(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, f"\\{character}")
    return text.replace("↓", r"$\downarrow$").replace("↑", r"$\uparrow$")


Measure = tuple[str, str | None, str | None]
"""Metric, dataset, speaker."""

ABX: list[Measure] = [
    ("abx", dataset, speaker) for speaker in ("within", "across") for dataset in ("dev-clean", "dev-other")
]
MAP: list[Measure] = [("map", dataset, None) for dataset in ("dev-clean", "dev-other")]


def _measured(
    title: str, experiments: Sequence[str], measures: Sequence[Measure], keep: pl.Expr, reproduced: pl.DataFrame
) -> Table:
    """A table of the published values, at the paper's layers and the reproduced ones."""
    published = pl.concat([results(name) for name in experiments]).filter(keep)
    reproduced = reproduced.filter(pl.col.experiment.is_in(list(experiments)) & keep)
    best_layer = pl.col.model.replace_strict(BEST_LAYER, default=None, return_dtype=pl.Int64)
    paper_rows = published.filter(pl.col.layer.is_null() | (pl.col.layer == best_layer))
    rows = pl.concat([paper_rows, reproduced]).select(ROW_KEYS).unique().rows()
    order = {name: index for index, name in enumerate([*MODELS, *REPRESENTATIONS])}
    rows.sort(key=lambda row: [order.get(key, 99) if isinstance(key, str) else key or 0 for key in row])
    used = [i for i in range(len(ROW_KEYS)) if any(row[i] is not None for row in rows)]
    names = {"model": "Model", "representation": "From", "num_units": "Units", "layer": "Layer", "lm_hours": "LM hours"}
    if len({row[1] for row in rows}) == 1:
        used.remove(1)
    labels = [[_label(ROW_KEYS[i], row[i]) for i in used] for row in rows]
    toplines = frozenset(number for number, row in enumerate(rows) if row[0] == "text")
    several_datasets = len({dataset for _, dataset, _ in measures}) > 1
    columns = []
    for metric, dataset, speaker in measures:
        better = "" if metric in NO_BEST else "min" if metric in LOWER_IS_BETTER else "max"
        name = " ".join([METRICS[metric], *filter(None, (dataset if several_datasets else None, speaker))])
        name += {"": "", "min": " ↓", "max": " ↑"}[better]
        decimals = DECIMALS.get(metric, 2 if metric in LOWER_IS_BETTER else 0)
        where = {"metric": metric, "dataset": dataset, "speaker": speaker}
        columns.append(Column(name, _values(published, rows, where), decimals, better, toplines))
        own = _values(reproduced, rows, where)
        if any(value is not None for value in own):
            columns.append(Column(f"{name} reproduced", own, decimals))
    return Table(title, [names[ROW_KEYS[i]] for i in used], labels, columns)


def _values(table: pl.DataFrame, rows: list[tuple[object, ...]], where: dict[str, str | None]) -> list[float | None]:
    table = table.filter(*(pl.col(name).eq_missing(pl.lit(value)) for name, value in where.items()))
    values = {row[:-1]: row[-1] for row in table.select(*ROW_KEYS, "value").iter_rows()}
    return [values.get(row) for row in rows]


def _label(key: str, value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}" if key == "lm_hours" else str(value)
    names = {"model": MODELS, "representation": REPRESENTATIONS}.get(key, {})
    return "" if value is None else names.get(str(value), str(value))


def _pretraining(_: pl.DataFrame) -> Table:
    table = pretraining_hours().sort("gpu_type", "compile", "gpus")
    rows = [
        [gpu.upper(), "yes" if compiled else "no", str(gpus)]
        for gpu, gpus, compiled in table.select("gpu_type", "gpus", "compile").iter_rows()
    ]
    hours = [float(value) for value in table["hours"]]
    gpu_hours = [float(a * b) for a, b in table.select("hours", "gpus").iter_rows()]
    columns = [Column("Hours ↓", list(hours), 0, "min"), Column("GPU hours ↓", list(gpu_hours), 0, "min")]
    return Table("Pretraining SpidR for 400,000 steps", ["GPU", "Compiled", "GPUs"], rows, columns)


DISCRETE = pl.col.representation.is_in(["codebooks", "kmeans"])
QUALITY = ("pnmi", "phone_purity", "cluster_purity", "codebook_perplexity", "active_codewords", "bitrate")

TABLES: dict[str, Callable[[pl.DataFrame], Table]] = {
    "abx-continuous": lambda own: _measured(
        "ABX error and MAP of words, features and probabilities of codebooks",
        ["abx", "map"],
        [*ABX, *MAP],
        ~DISCRETE,
        own,
    ),
    "abx-discrete": lambda own: _measured("ABX error of units", ["abx"], ABX, DISCRETE, own),
    "unit-quality": lambda own: _measured(
        "Unit quality on dev-clean and dev-other",
        ["unit_quality"],
        [(name, "dev-clean+dev-other", None) for name in QUALITY],
        DISCRETE,
        own,
    ),
    "spoken-lm": lambda own: _measured(
        "Zero-shot accuracy (%) of spoken language models",
        ["spoken_lm"],
        [(name, None, None) for name in ("swuggy_all", "swuggy_invocab", "sblimp", "tsc", "ssc")],
        pl.lit(value=True),
        own,
    ),
    "superb": lambda own: _measured(
        "SUPERB", ["superb"], [("per", None, None), ("asr", None, None)], pl.lit(value=True), own
    ),
    "pretraining-time": _pretraining,
}


def read_reproduced(paths: Sequence[Path]) -> pl.DataFrame:
    """Results of ``reproduce.py``; if a value occurs twice, the last one counts."""
    try:
        tables = [pl.read_csv(path, schema=SCHEMA) for path in paths]
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{', '.join(map(str, paths))}: not results of paper/reproduce.py ({error}).") from None
    return pl.concat([pl.DataFrame(schema=SCHEMA), *tables]).unique(KEYS, keep="last", maintain_order=True)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TABLES,
        default=list(TABLES),
        metavar="NAME",
        help=f"{', '.join(TABLES)} (default: all)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/paper/tables"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--reproduced", type=Path, nargs="+", default=[], help="results.csv of paper/reproduce.py (default: none)"
    )
    args = parser.parse_args(argv)
    reproduced = read_reproduced(args.reproduced)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        table = TABLES[name](reproduced)
        for suffix, text in ((".md", table.markdown()), (".tex", table.latex()), (".csv", table.csv())):
            with atomic_write(args.output / f"{name}{suffix}") as file:
                file.write(text.encode())
        write_result(f"{args.output / name}.md\n")


if __name__ == "__main__":
    sys.exit(main())

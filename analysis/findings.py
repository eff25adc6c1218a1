"""What an analysis found: sentences, tables, pictures; as files, on the terminal, in a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from ray_subnets import figures
from ray_subnets.checkpoints import RunFolder
from ray_subnets.memory import keep_freed


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn when it is needed, in inches; `name` is its file's."""

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]

    def svg(self) -> str:
        """In the page's text colour, so that it serves light, dark and print."""
        return figures.svg(self.name, self.size, self.draw, self.title)

    def png(self) -> bytes:
        return figures.png(self.size, self.draw)


@dataclass(frozen=True)
class Table:
    """Rows as a person reads them, and the numbers behind them."""

    name: str
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: pd.DataFrame

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.headings)} |", "|" + "---|" * len(self.headings)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def csv(self) -> str:
        return self.numbers.to_csv(index=False)


@dataclass(frozen=True)
class Findings:
    """All that one analysis has to say; `name` is the module's. `data` is for other programs only:
    long tables that are not shown."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    data: Sequence[Table] = ()

    def write(self, place: RunFolder) -> list[str]:
        """Every table as CSV and Markdown, every picture as PNG and SVG; returns the files' names.

        Raises:
            ValueError: the folder cannot be written.
        """
        files: dict[str, bytes] = {}
        for table in (*self.tables, *self.data):
            files[f"{table.name}.csv"] = table.csv().encode()
        for table in self.tables:
            files[f"{table.name}.md"] = f"{table.title}\n\n{table.markdown()}\n".encode()
        for picture in self.pictures:
            files[f"{picture.name}.png"] = picture.png()
            files[f"{picture.name}.svg"] = picture.svg().encode()
        for name, content in files.items():
            place.write(name, content)
        return list(files)

    def show(self) -> None:
        """Print tables as Markdown, then the sentences."""
        for table in self.tables:
            print(f"{table.title}\n\n{table.markdown()}\n")
        for line in self.text:
            print(line)


def place(out: str | None, runs: Sequence[str]) -> RunFolder:
    """Where results go, made if it is not there: `out`, or `analysis` in the first run."""
    return RunFolder(runs[0]).within("analysis") if out is None else RunFolder(out).within("")


def parser(description: str, *, several: bool = True) -> argparse.ArgumentParser:
    """Arguments that every analysis has: run folders, and where to write."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "runs",
        nargs="+" if several else 1,
        metavar="RUN",
        help="finished run folders, or cells of a benchmark",
    )
    made.add_argument("--out", metavar="FOLDER", help="default: analysis in the (first) run")
    return made


def main(name: str, find: Callable[[], Findings], arguments: argparse.Namespace) -> int:
    """Do it, print and write what was found. The user's mistakes are one line and exit code 2."""
    keep_freed()
    try:
        found = find()
        where = place(arguments.out, arguments.runs)
        files = found.write(where)
    except ValueError as error:
        print(f"analysis.{name}: {error}", file=sys.stderr)
        return 2
    found.show()
    print(f"\n{len(files)} files in {where}: {', '.join(files)}")
    return 0

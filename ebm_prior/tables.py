"""One table, three places: the terminal, the model card (Markdown), the report (HTML)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ebm_prior.saved import is_text

__all__ = ["Table", "escaped"]

MAX_ROWS, MAX_COLUMNS = 200, 20


@dataclass(frozen=True)
class Table:
    """Formatted numbers.

    Attributes:
        title: One line above.
        header: Of every column; the first column names the rows.
        rows: Cells as they are shown.
        note: One line below: what was measured, on how many, with what.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """Aligned columns for a terminal; numbers to the right."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        shown = [
            " ".join(
                [
                    cells[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
                ]
            )
            for cells in lines
        ]
        return "\n".join([*([self.title] if self.title else []), *shown, *self._note()])

    def markdown(self) -> str:
        """A table for a model card, whose cells cannot break out of it."""
        head = "|" + "|".join(["---"] + ["---:"] * (len(self.header) - 1)) + "|"
        body = ["| " + " | ".join(map(escaped, cells)) + " |" for cells in self.rows]
        top = "| " + " | ".join(map(escaped, self.header)) + " |"
        notes = ["", *map(escaped, self._note())] if self.note else []
        return "\n".join([escaped(self.title), "", top, head, *body, *notes])

    def _note(self) -> list[str]:
        return [self.note] if self.note else []

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object) -> Table | None:
        """The table that `to_dict` gave, or None if anything about the value is odd.

        It may come from a stranger's configuration.
        """
        if not isinstance(value, dict) or value.keys() != {"title", "header", "rows", "note"}:
            return None
        header, rows = value["header"], value["rows"]
        if not isinstance(header, list) or not isinstance(rows, list):
            return None
        if not 1 <= len(header) <= MAX_COLUMNS or len(rows) > MAX_ROWS:
            return None
        if not all(isinstance(row, list) and len(row) == len(header) for row in rows):
            return None
        cells = [value["title"], value["note"], *header, *(cell for row in rows for cell in row)]
        return cls(**value) if all(map(is_text, cells)) else None


def escaped(text: str) -> str:
    """One line as Markdown that shows it as it is, and nothing else."""
    for sign in "\\|<>[]`*_#!":
        text = text.replace(sign, "\\" + sign)
    return text

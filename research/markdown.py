"""Markdown tables. Used by research/study_report.py and tables.py."""


def table(columns: list[str], lines: list[list[str]]) -> str:
    """A table of text cells."""
    out = [_row(columns), "|---" * len(columns) + "|"]
    return "\n".join([*out, *map(_row, lines)])


def _row(cells):
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"

"""Columns of records: their values, and what to do where a column is missing."""

import re
from typing import Any

from bertlite.core.errors import UserError
from bertlite.data.formats import Record


def get_column(record: Record, name: str, setting: str) -> Any:
    """Return the value of a column. Raises UserError, listing the columns, if there is no such column."""
    if name not in record.columns:
        columns = list(map(str, record.columns))
        names = ", ".join(repr(column if len(column) <= 40 else f"{column[:39]}…") for column in columns)
        advice = advise_about_columns(name, columns)
        if not advice and setting.endswith("label"):
            advice = "; texts without labels are for bertlite predict"
        raise UserError(f"{record.location}: {setting}: there is no column {name!r}; there are {names}{advice}")
    return record.columns[name]


def advise_about_columns(name: str, columns: list[str]) -> str:
    """Return what may help where a table has other columns than `name`; "" for nothing known."""
    if any(column.replace(".", "", 1).isdecimal() or len(column.split()) > 4 for column in columns):
        return "; if these are an example and no header, name the columns in task.columns"
    if len(columns) == 1 and (found := re.search(r"[;|\t,]", columns[0])):
        sign = found[0]
        return f"; {sign!r} seems to separate them: set task.delimiter, or let the file begin with a line sep={sign}"
    whole = next((column for column in columns if column.startswith(f"{name} #")), None)
    return f"; a # after a blank begins a comment in YAML: quote the name, {whole!r}" if whole else ""

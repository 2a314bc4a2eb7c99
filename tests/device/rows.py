"""The results of a part: rows that are written as they come."""

import json
from pathlib import Path


class Rows:
    """Appends rows to a file. A row with a bound is a check."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part

    def add(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        *,
        bound: float | None = None,
        ok: bool | None = None,
    ) -> None:
        """Adds a row; it is ok if its value is at most the bound, or as `ok` says."""
        if bound is not None:
            ok = float(value) <= bound
        row = {
            "part": self._part,
            "name": name,
            "value": value,
            "unit": unit,
            "bound": bound,
            "ok": ok,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

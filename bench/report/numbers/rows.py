"""The rows of a committed CSV file, found by the values of their columns."""

from bench.tools.measuring import RESULTS, Row, read_rows


class Rows:
    """The rows of one file below bench/results."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.all = read_rows(RESULTS / name)

    def where(self, **columns: object) -> list[Row]:
        """Returns the rows with these values; a column that the file lacks is empty."""
        wanted = {name: str(value) for name, value in columns.items()}
        return [
            row for row in self.all if all(row.get(k, "") == value for k, value in wanted.items())
        ]

    def one(self, **columns: object) -> Row:
        """Returns the only row with these values.

        Raises:
            LookupError: There is no such row, or more than one.
        """
        found = self.where(**columns)
        if len(found) != 1:
            raise LookupError(f"{self.name} has {len(found)} rows with {columns}, not one")
        return found[0]

    def value(self, column: str, **columns: object) -> float:
        """Returns the number in a column of the only row with these values.

        Raises:
            LookupError: There is no such row, more than one, or no number in it.
        """
        return self._number(self.one(**columns), column)

    def values(self, column: str, **columns: object) -> list[float]:
        """Returns the numbers in a column of every row with these values, in the file's order.

        Raises:
            LookupError: There is no such number, or a cell has another text.
        """
        found = self.where(**columns)
        numbers = [self._number(row, column) for row in found if row.get(column) != ""]
        if not numbers:
            raise LookupError(f"{self.name} has no {column} in rows with {columns}")
        return numbers

    def _number(self, row: Row, column: str) -> float:
        try:
            return float(row[column])
        except (KeyError, TypeError, ValueError):  # no column, no cell, another text
            raise LookupError(
                f"{self.name} has no number in column {column!r}, but {row.get(column)!r}"
            ) from None

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
        """Returns the number in a column of the only row with these values."""
        return float(self.one(**columns)[column])

    def values(self, column: str, **columns: object) -> list[float]:
        """Returns the numbers in a column of every row with these values, in the file's order."""
        return [float(row[column]) for row in self.where(**columns) if row[column]]

"""Rows of the hub's parquet files."""

from pathlib import Path

import pyarrow as pa

from jaxchat.config import UserError
from jaxchat.data.sources import open_parquet


class Table:
    """Rows of the parquet files of a data set, each made a conversation when asked for. name: as in launch.download."""

    def __init__(self, name: str, folder: Path, pattern: str, columns: list[str], convert):
        self.paths = paths = sorted(folder.glob(pattern))
        if not paths:
            raise UserError(
                f"no {pattern} in {folder}; fetch them: python -m launch.download {name}; or name --tasks_dir"
            )
        try:
            tables = [open_parquet(path, columns).read(columns=columns) for path in paths]
            self._table = pa.concat_tables(tables).combine_chunks()
        except pa.ArrowException as problem:
            raise UserError(f"{folder}/{pattern} cannot be read ({str(problem).splitlines()[0]})") from problem
        self._convert = convert

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict:
        row = {name: self._table[name][index].as_py() for name in self._table.column_names}
        for name, cell in row.items():
            if cell is None:
                raise UserError(f"`{name}` is null")
        return self._convert(row)

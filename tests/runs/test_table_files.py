"""Table files are read as their records describe; `test_tables.py` loads whole runs from them."""

import numpy as np
import pytest

from memjax.errors import CheckpointError
from memjax.ops.row_formats import formats
from memjax.runs.table_files import read_files, write_files
from memjax.runs.tables import TableForm, encoded


@pytest.mark.parametrize("num_rows", [1, 4096])
def test_a_disk_that_fills_up_is_an_error_and_no_shorter_file(tmp_path, num_rows):
    rows = np.ones((num_rows, 10), np.float32)
    form = TableForm.of("shared", rows, formats.find("bfloat16"))
    (tmp_path / "shared.rows").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path, form, encoded([(0, rows)], form.format))


@pytest.mark.parametrize("file", ["rows", "scales"])
def test_a_record_without_a_file_of_its_format_is_refused(tmp_path, file):
    rows = np.ones((4, 64), np.float32)
    form = TableForm.of("shared", rows, formats.find("int8"))
    record = write_files(tmp_path, form, encoded([(0, rows)], form.format))
    del record["files"][file]
    with pytest.raises(CheckpointError, match="table shared in int8 needs the files rows, scales"):
        read_files(tmp_path, form, record, None)

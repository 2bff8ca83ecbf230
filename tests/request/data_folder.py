"""Where the test data lies that is too large for the repository; tests skip where it is absent."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


def data_folder(name: str) -> Path:
    """A folder of the test data: JINFER_TEST_DATA/name, else ../shared/data/name."""
    folder = Path(os.environ.get("JINFER_TEST_DATA", _BESIDE)) / name
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set JINFER_TEST_DATA")
    return folder

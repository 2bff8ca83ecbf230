"""`jinfer bench startup`: from the command to the first token, cold and warm."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

from jinfer.bench.table import figure, table
from jinfer.compile.names import (
    COPY_PAGES,
    GATHER_PAGES,
    RESTORE_COUNTS,
    SCATTER_PAGES,
    WRITE_SLOTS,
)

Figures = dict[str, Any]  # printed by one_start, plus `total_s`


def measure_startup(
    model: str, engine_args: Mapping[str, Any], say: Callable[[str], object]
) -> dict[str, Figures]:
    """Starts twice, each time in a new process, with one folder for compiled programs.

    Args:
      model: a shape's name, a shipped model, a folder or a hub name.
      engine_args: keywords of LLM; a temporary folder replaces `compilation_cache`.
      say: called with a line before each start.

    Raises:
      ValueError: a start failed.
    """
    with TemporaryDirectory() as folder:
        asked = {**engine_args, "compilation_cache": folder, "progress": False}
        figures = {}
        for name in ("cold", "warm"):
            say(f"{name} start")
            figures[name] = _start(model, asked)
    return figures


def _start(model: str, engine_args: Mapping[str, Any]) -> Figures:
    command = [sys.executable, "-m", "jinfer.bench.one_start", model, json.dumps(engine_args)]
    # The next cold start would find programs in a folder from the environment.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    begun_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    total_s = time.perf_counter() - begun_s
    if done.returncode:
        raise ValueError(f"a start failed; got: {_last_line(done.stderr)}")
    return {**json.loads(_last_line(done.stdout)), "total_s": total_s}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


_ROWS = (
    ("import jinfer and JAX", "import_s"),
    ("LLM(...), all in all", "engine_s"),
    ("  loading the weights", "weights_s"),
    ("  beside that, getting programs", "programs_s"),
)
_ROWS_BELOW = (
    ("first token", "first_token_s"),
    ("process, from start to end", "total_s"),
)
_SAID = {
    WRITE_SLOTS: "starting sequences",
    RESTORE_COUNTS: "restarting a sequence with penalties",
    COPY_PAGES: "copying KV pages",
    GATHER_PAGES: "KV pages to the host",
    SCATTER_PAGES: "KV pages from the host",
}


def program_said(name: str) -> str:
    """A program's name for a reader who has not seen the code."""
    kind, *rest = name.split()
    if kind == "step":
        return f"prompts, up to {rest[1]} tokens at once"
    if kind == "decode":
        return f"output, {'one' if rest[1] == '1' else f'up to {rest[1]}'} at once"
    return _SAID[name]


def startup_text(figures: Mapping[str, Figures]) -> str:
    """The table: seconds of each part and program, and the number of programs compiled or read."""
    columns = list(figures.values())

    def row(said: str, cell: Callable[[Figures], str]) -> tuple[str, ...]:
        return (said, *map(cell, columns))

    def seconds(said: str, key: str) -> tuple[str, ...]:
        return row(said, lambda each: _seconds(each[key]))

    rows = [seconds(said, key) for said, key in _ROWS]
    rows += [
        row(
            f"    {program_said(name)}",
            lambda each, name=name: _seconds(each["program_s"].get(name)),
        )
        for name in columns[0]["program_s"]
    ]
    rows += [seconds(said, key) for said, key in _ROWS_BELOW]
    rows.append(row("weights, GB/s", _load_rate))
    rows.append(row("programs compiled", lambda each: f"{each['num_compiled']:.0f}"))
    rows.append(row("programs read from disk", lambda each: f"{each['num_read']:.0f}"))
    return table(("seconds", *figures), rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _load_rate(figures: Figures) -> str:
    if not figures["weights_bytes"]:  # random weights
        return "-"
    return figure(figures["weights_bytes"] / 1e9 / figures["weights_s"])

"""Engines of all tests share one store of compiled programs.

Tracing and compiling the programs of a small engine takes ten times as long as loading them, and
many tests start engines of the same sizes. The first one of a run traces and compiles, with all
checks of shapes.

Some tests replace a part of the code that is traced. The store does not know what they put there,
so it stays closed to them.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jinfer.startup.load
from jinfer.compile.program_store import ProgramStore, open_store

# Modules whose functions are traced, and those that choose them and the arrays' layouts.
_TRACED = (
    "jinfer.models",
    "jinfer.parallel",
    "jinfer.sampling",
    "jinfer.startup.programs",
    "jinfer.step",
    "jinfer.weights.layout",
    "kernels_pallas",
)


def install() -> None:
    """Opens the store for every engine that is made of the code as it is now."""
    original = _traced_code()

    def open_unless_replaced(devices: Sequence[Any]) -> ProgramStore | None:
        code = _traced_code()
        is_original = all(code.get(name) is value for name, value in original.items())
        return open_store(devices) if is_original else None

    jinfer.startup.load.open_store = open_unless_replaced


def _traced_code() -> dict[tuple[str, ...], Any]:
    """What every name of the traced modules, and in their classes and tables, stands for."""
    code: dict[tuple[str, ...], Any] = {}
    for module_name, module in list(sys.modules.items()):
        if not f"{module_name}.".startswith(tuple(f"{name}." for name in _TRACED)):
            continue
        for name, value in list(vars(module).items()):
            code[module_name, name] = value
            is_class = isinstance(value, type) and value.__module__ == module_name
            table = vars(value) if is_class else value if isinstance(value, dict) else {}
            code |= {(module_name, name, str(key)): held for key, held in table.items()}
    return code

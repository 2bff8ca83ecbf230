"""Keys of compiled programs: the inputs of a program as text. Equal texts mean equal programs.

The sources are traced and lowered, then the lowered program is compiled; each stage has its own
text. A text includes everything that might change the program: a needless compilation costs
seconds, a wrong program gives wrong answers.
"""

import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import ml_dtypes
import numpy as np
from jax.tree_util import keystr

import kernels_pallas
from kernels_pallas.compat import compile_options, kept_arguments

# JAX flags that only control caching and logging.
_KEEPING_AND_LOGGING = (
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_explain_cache_misses",
    "jax_log",
    "jax_persistent_cache",
    "jax_raise_persistent_cache_errors",
)
# Environment variables of compilers; JAX's own are among its flags. XLA's flags are also recorded
# as XLA parsed them: it reads XLA_FLAGS once, and later changes have no effect.
_VARIABLES = ("LIBTPU_", "NVIDIA_TF32_", "PJRT_", "TF_XLA_", "TPU_", "XLA_")
# Prefixes of packages with compilers or with libraries that programs call.
_PACKAGES = ("jax", "libtpu", "nvidia")
_OF_PROCESSOR = ("Features", "flags", "model name", "CPU part", "CPU variant")


def sources_digest() -> str | None:
    """The sha256 of every source file of jinfer and kernels_pallas; None if one cannot be read."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(*kernels_pallas.__path__)):
        paths = sorted(package.rglob("*.py"))
        if not paths:
            return None  # in a zip file, or bytecode only
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError:
                return None
            name = path.relative_to(package).as_posix()
            digest.update(f"{package.name}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


_SOURCES = sources_digest()  # at import; files may be edited while the process runs


class Surroundings(NamedTuple):
    """Inputs that all programs of an engine have in common."""

    tracing: str  # inputs of tracing and lowering
    compiling: str  # inputs of the compiler


def surroundings(devices: Sequence[Any]) -> Surroundings | None:
    """The inputs of programs in this process, as they are now.

    Args:
      devices: the devices that run the programs, in mesh order.

    Returns:
      None if they are unknown: the sources cannot be read, or have changed since the import.
    """
    if _SOURCES is None or sources_digest() != _SOURCES:
        return None
    client = devices[0].client
    flags = jax.config.values
    traced_by = [f"{m.__name__} {m.__version__}" for m in (flax, np, ml_dtypes)]
    compiled_by = {
        "versions": _versions(),
        "compiler": (client.platform, client.platform_version),
        "devices": [(repr(device), device.device_kind) for device in devices],
        "neighbours": [repr(device) for device in client.devices()],
        "flags": {
            name: flags[name] for name in sorted(flags) if not name.startswith(_KEEPING_AND_LOGGING)
        },
        "options": compile_options(),
        "variables": _variables(),
        "arguments": [word for word in sys.argv if word.startswith("--xla")],
        "processor": _processor() if client.platform == "cpu" else None,
    }
    return Surroundings(tracing=repr((_SOURCES, traced_by)), compiling=repr(compiled_by))


def shapes_text(shapes: Any) -> str:
    """A pytree of shapes as text, with dtypes, shardings and layouts."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    told = [
        (keystr(path), a.shape, str(a.dtype), a.weak_type, a.sharding, a.format)
        for path, a in leaves
    ]
    return repr((str(structure), told))


def bound_text(function: Any) -> str | None:
    """A function and every argument bound to it by `functools.partial`, as text.

    None if the text would not identify the function: it is a closure, a lambda or a method, or an
    argument has no `__repr__` of its own.
    """
    if isinstance(function, partial):
        parts = (function.func, *function.args, *function.keywords.values())
        texts = [_value_text(part) for part in parts]
        return None if None in texts else repr((texts, list(function.keywords)))
    function = inspect.unwrap(function)  # decorators are part of the sources
    is_plain = inspect.isfunction(function) and function.__closure__ is None
    if not is_plain or function.__name__ == "<lambda>":
        return None
    return f"{function.__module__}.{function.__qualname__}"


def _value_text(value: Any) -> str | None:
    if callable(value):
        return bound_text(value)
    return None if type(value).__repr__ is object.__repr__ else repr(value)


def lowered_text(lowered: jax.stages.Lowered, shapes: Any) -> str | None:
    """A lowered program and the shapes of its arguments as text, without source lines.

    None if JAX does not report which arguments it kept: the lowered text has only their number.
    """
    kept = kept_arguments(lowered)
    if kept is None:
        return None
    return repr((shapes_text(shapes), kept, shapes_text(lowered.out_info), lowered.as_text()))


def _versions() -> list[str]:
    own = [f"{m.__name__} {m.__version__}" for m in (jax, jaxlib)]
    # Only folder names, NAME-VERSION.dist-info: reading the folders takes 100 ms.
    found = {
        path.name
        for folder in map(Path, sys.path)
        for prefix in _PACKAGES
        for path in folder.glob(f"{prefix}*.dist-info")
    }
    return [sys.version, *own, *sorted(found)]


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}


def _processor() -> list[str]:
    """Properties of this machine that change machine code or its division into threads."""
    lines = {line for line in _text_of("/proc/cpuinfo").splitlines()}
    features = sorted(line for line in lines if line.startswith(_OF_PROCESSOR))
    affinity = getattr(os, "sched_getaffinity", lambda _: ())(0)
    counts = f"{os.cpu_count()} processors, {len(affinity)} for this process"
    # Without a list of features, the host name keeps programs on this machine.
    return [platform.machine(), counts, *(features or [platform.node()])]


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""

"""What compiled programs are made from, as text: of equal texts come equal programs.

A program is traced and lowered from the sources, then compiled from what that gave; there is a text
for either. What cannot be known to leave a program as it is, is in the text: a program compiled
once too often costs seconds, a wrong one costs answers.
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

# Flags of JAX that only say where and how to keep programs, or what to log.
_KEEPING_AND_LOGGING = (
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_explain_cache_misses",
    "jax_log",
    "jax_persistent_cache",
    "jax_raise_persistent_cache_errors",
)
# Variables that compilers read; JAX's own are among its flags. XLA's are also told as it understood
# them: it reads XLA_FLAGS once, and who sets them later sets nothing.
_VARIABLES = ("LIBTPU_", "NVIDIA_TF32_", "PJRT_", "TF_XLA_", "TPU_", "XLA_")
# Packages beside those that are asked themselves: compilers, and libraries that programs call.
_PACKAGES = ("jax", "libtpu", "nvidia")
_OF_PROCESSOR = ("Features", "flags", "model name", "CPU part", "CPU variant")


def sources_digest() -> str | None:
    """The sha256 of every source file of jinfer and kernels_pallas; None if one cannot be read."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(*kernels_pallas.__path__)):
        paths = sorted(package.rglob("*.py"))
        if not paths:
            return None  # in a zip file, or compiled only
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError:
                return None
            name = path.relative_to(package).as_posix()
            digest.update(f"{package.name}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


_SOURCES = sources_digest()  # now, as they are imported; they may be edited while this runs


class Surroundings(NamedTuple):
    """What all programs of an engine follow from, beside the description of each."""

    tracing: str  # from the sources to a lowered program
    compiling: str  # from there on


def surroundings(devices: Sequence[Any]) -> Surroundings | None:
    """What programs follow from here and now.

    Args:
      devices: those the programs run on, in the order of their mesh.

    Returns:
      None where it cannot be told: the sources are not at hand, or no longer those imported.
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
    """A pytree of shapes with their dtypes, places and layouts."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    told = [
        (keystr(path), a.shape, str(a.dtype), a.weak_type, a.sharding, a.format)
        for path, a in leaves
    ]
    return repr((str(structure), told))


def bound_text(function: Any) -> str | None:
    """A function and every argument bound to it by `functools.partial`, as text.

    None where the text would not tell what the function computes: it is a closure, a lambda or a
    method, or an argument has no text of its own.
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
    """A lowered program of arguments with these shapes, source lines apart.

    None where JAX does not tell which of the arguments it has: the text says only how many.
    """
    kept = kept_arguments(lowered)
    if kept is None:
        return None
    return repr((shapes_text(shapes), kept, shapes_text(lowered.out_info), lowered.as_text()))


def _versions() -> list[str]:
    own = [f"{m.__name__} {m.__version__}" for m in (jax, jaxlib)]
    # Only names of folders, NAME-VERSION.dist-info: to read what is in them takes 100 ms.
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
    """What machine code for this processor, and how it is cut into threads, depend on."""
    lines = {line for line in _text_of("/proc/cpuinfo").splitlines()}
    features = sorted(line for line in lines if line.startswith(_OF_PROCESSOR))
    affinity = getattr(os, "sched_getaffinity", lambda _: ())(0)
    counts = f"{os.cpu_count()} processors, {len(affinity)} for this process"
    # Where a processor does not tell its features, its programs stay on that machine.
    return [platform.machine(), counts, *(features or [platform.node()])]


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""

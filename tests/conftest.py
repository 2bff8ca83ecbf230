"""Settings of the whole suite. The environment is set before JAX is imported."""

import gc
import os
from contextlib import nullcontext

from fast_compiles import FAST_COMPILES

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Tests reuse programs that earlier tests or runs compiled.
_CACHE = os.path.join(os.path.dirname(__file__), os.pardir, ".pytest_cache", "xla")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402 - after its environment

# XLA for CPUs reads its flags once, here. Afterwards the variable is restored, for processes that
# tests start and for the compilers of accelerators.
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{FAST_COMPILES} {_FLAGS}"
jax.devices()
os.environ["XLA_FLAGS"] = _FLAGS

from beartype._decor._nontype._wrap import _wrapargs, _wrapreturn  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Check annotated arrays at run time, including shapes across arguments.
install_import_hook(["jinfer.models", "jinfer.sampling", "jinfer.step"], "beartype.beartype")

# When beartype wraps a function, it calls `catch_warnings`, which is not thread-safe: warnings of
# other threads get lost, and may stay suppressed. Nested functions are wrapped whenever they are
# created, so also while several threads trace programs.
for _module in (_wrapargs, _wrapreturn):
    assert hasattr(_module, "catch_warnings"), f"beartype changed: {_module=}"
    _module.catch_warnings = lambda record: nullcontext([])

import kept_programs  # noqa: E402 - after the hook

kept_programs.install()

# Whatever was imported until here stays; the garbage collector need not look at it again.
gc.collect()
gc.freeze()

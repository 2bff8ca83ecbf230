"""Settings of the whole suite. The environment is fixed before JAX is imported."""

import os
from contextlib import nullcontext

from fast_compiles import FAST_COMPILES

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Programs compiled by one test, or by the run before, are read back by the next.
_CACHE = os.path.join(os.path.dirname(__file__), os.pardir, ".pytest_cache", "xla")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402 - after its environment

# XLA for CPUs reads its flags once, here. Processes started by tests, and the compilers for
# accelerators, find those that were asked for.
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{FAST_COMPILES} {_FLAGS}"
jax.devices()
os.environ["XLA_FLAGS"] = _FLAGS

from beartype._decor._nontype._wrap import _wrapargs, _wrapreturn  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotated array of the package is checked at run time, shapes across arguments included.
install_import_hook(["jinfer.models", "jinfer.sampling", "jinfer.step"], "beartype.beartype")

# Wrapping a function, beartype looks for warnings with `catch_warnings`, which two threads may not
# do at once: what others warn of meanwhile is lost, and may stay so. Functions inside functions are
# wrapped when they are made, so also where programs are traced side by side.
for _module in (_wrapargs, _wrapreturn):
    assert hasattr(_module, "catch_warnings"), f"beartype changed: {_module=}"
    _module.catch_warnings = lambda record: nullcontext([])

import jinfer.startup.load  # noqa: E402 - after the hook

# Tests replace parts of what is traced. A program kept from one of them would be found again by
# others, and no shapes are checked in what is found. tests/compile/test_program_store.py restores
# it.
jinfer.startup.load.open_store = lambda devices: None

"""Settings of the whole suite. The environment is fixed before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated array of the package is checked at run time, shapes across arguments included.
install_import_hook(["jinfer.models", "jinfer.step"], "beartype.beartype")

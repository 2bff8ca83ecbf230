"""XLA compiler options for an engine's programs, in addition to XLA_FLAGS."""

import os
import re

Options = tuple[tuple[str, str], ...]  # XLA's names and values

_DISABLED = "xla_disable_hlo_passes"
_FUSION_AUTOTUNER = "xla_gpu_experimental_enable_fusion_autotuner"


def compiler_options(platform: str) -> Options:
    """Options for a platform. An option overrides the user's flag, so it includes its value."""
    if platform != "gpu":
        return ()
    flags = os.environ.get("XLA_FLAGS", "")
    disabled = re.findall(rf"--{_DISABLED}=(\S+)", flags)[-1:]  # the last one counts
    # The pool fills a GPU's memory. XLA may take it for short of memory and compute a sixth of a
    # step's kernels twice, to save memory that the plan has reserved for them anyway.
    options = [(_DISABLED, ",".join([*disabled, "rematerialization"]))]
    if _FUSION_AUTOTUNER not in flags:
        # Since jax 0.11, XLA compiles each kernel other than a matmul alone, once per candidate,
        # and then again with all others: a program takes half as long again.
        options.append((_FUSION_AUTOTUNER, "False"))
    return tuple(options)

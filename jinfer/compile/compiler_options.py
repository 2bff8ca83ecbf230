"""What XLA is asked for an engine's programs, beside its flags."""

import os
import re

Options = tuple[tuple[str, str], ...]  # XLA's names and values

_DISABLED = "xla_disable_hlo_passes"
_FUSION_AUTOTUNER = "xla_gpu_experimental_enable_fusion_autotuner"


def compiler_options(platform: str) -> Options:
    """Ours for a platform. An option hides the user's flag of its name, so theirs are in it."""
    if platform != "gpu":
        return ()
    flags = os.environ.get("XLA_FLAGS", "")
    disabled = re.findall(rf"--{_DISABLED}=(\S+)", flags)[-1:]  # of several, the last counts
    # The pool fills a GPU's memory, so XLA may find it short, and compute a sixth of a step's
    # kernels twice to spare what the plan has set apart for them anyway.
    options = [(_DISABLED, ",".join([*disabled, "rematerialization"]))]
    if _FUSION_AUTOTUNER not in flags:
        # Since jax 0.11 each kernel that is no product is compiled alone, once per way to make it,
        # and then again with all others: half as long again for each program.
        options.append((_FUSION_AUTOTUNER, "False"))
    return tuple(options)

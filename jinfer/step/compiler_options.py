"""What XLA is asked for an engine's programs, beside its flags."""

import os
import re

Options = tuple[tuple[str, str], ...]  # XLA's names and values

_DISABLED = "xla_disable_hlo_passes"
# The pool fills a GPU's memory, so XLA may find it short, and compute a sixth of a step's kernels
# twice to spare what the plan has set apart for them anyway.
_DISABLED_ON = {"gpu": "rematerialization"}


def compiler_options(platform: str) -> Options:
    """Passes that are left out on a platform: ours and the user's, whose flag an option hides."""
    ours = _DISABLED_ON.get(platform)
    if ours is None:
        return ()
    asked = re.findall(rf"--{_DISABLED}=(\S+)", os.environ.get("XLA_FLAGS", ""))
    return ((_DISABLED, ",".join([*asked[-1:], ours])),)  # of a flag given twice, the last counts

"""XLA compiler options for an engine's programs, in addition to XLA_FLAGS."""

import os
import re

import jax

Options = tuple[tuple[str, str], ...]  # XLA's names and values

_DISABLED = "xla_disable_hlo_passes"
_FUSION_AUTOTUNER = "xla_gpu_experimental_enable_fusion_autotuner"


def compiler_options(platform: str, *, quick: bool = False) -> Options:
    """Options for a platform. An option overrides the user's flag, so it includes its value.

    Args:
      platform: "cpu", "gpu" or "tpu".
      quick: compile with less effort, for slower programs; has no effect on TPUs. On a Zen 3 CPU,
        programs of a 6-layer model compiled in 0.3 to 0.5 of the time; decodes of a 125M-shaped
        model took 1.6 (1 row) to 2.5 times as long (32 rows), its steps 1.5 times.
    """
    if platform == "cpu":
        return _quick_cpu_options() if quick else ()
    if platform == "gpu":
        return (*_gpu_options(), *((("xla_gpu_autotune_level", "0"),) if quick else ()))
    return ()


def _quick_cpu_options() -> Options:
    options = [
        ("xla_backend_optimization_level", "0"),
        ("xla_llvm_disable_expensive_passes", "True"),
    ]
    if jax.__version_info__ < (0, 11):  # later versions have no other way to emit fusions
        options.append(("xla_cpu_use_fusion_emitters", "False"))
    return tuple(options)


def _gpu_options() -> Options:
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

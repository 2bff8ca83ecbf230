"""Flags that cut XLA's compile time for CPUs to a third.

Nearly all the suite's time goes into compiling. The flags switch off LLVM's optimisations and,
before jax 0.11 removed the flag, MLIR for fusions. Compilers for accelerators read the same
variable, so processes that may load one must not inherit these flags.
"""

from importlib.metadata import version

FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    FAST_COMPILES += " --xla_cpu_use_fusion_emitters=false"

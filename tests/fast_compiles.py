"""Flags with which XLA compiles programs for CPUs in a third of the time.

Nearly all the suite's time goes into compiling. LLVM leaves out its optimisations, and before jax
0.11, which no longer knows that flag, fusions do not go through MLIR. Compilers for accelerators
read the same variable, so no process that may load one inherits these.
"""

from importlib.metadata import version

FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    FAST_COMPILES += " --xla_cpu_use_fusion_emitters=false"

"""Describes chips that are not present, to compile for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jinfer.startup.chips import CHIPS, Chip

# GPU figures that the compiler needs beside those in CHIPS: multiprocessors, shared memory in bytes
# (of a multiprocessor, of a block), threads, floating-point units, L2 in MiB, clock in GHz.
_GPU_DETAILS = {
    "t4": (40, 65_536, 65_536, 1024, 64, 4, 1.59),
    "a100": (108, 167_936, 166_912, 2048, 64, 40, 1.41),
    "l4": (58, 102_400, 101_376, 1536, 128, 48, 2.04),
    "h100": (132, 233_472, 232_448, 2048, 128, 50, 1.98),
    "h200": (132, 233_472, 232_448, 2048, 128, 60, 1.98),
    "b200": (148, 233_472, 232_448, 2048, 128, 126, 1.97),
}


def chip_named(name: str) -> Chip:
    """One of CHIPS, by name.

    Raises:
      ValueError: CHIPS has no such name.
    """
    if name not in CHIPS:
        raise ValueError(
            f"--target must be one of {', '.join(CHIPS)}; got {name!r}. Choose one of these."
        )
    return CHIPS[name]


def default_target() -> str | None:
    """A chip whose compiler is installed, for machines without an accelerator; else None."""
    for module, name in (("libtpu", "v6e"), ("jax_plugins.xla_cuda13", "h200")):
        if _is_installed(module):
            return name
    return None


def _is_installed(module: str) -> bool:
    package, _, inner = module.partition(".")
    # `find_spec` of an inner module imports the package, so that must be there.
    return find_spec(package) is not None and (not inner or find_spec(module) is not None)


def describe(name: str) -> tuple[Any, float]:
    """A device of that kind to compile for, and the fraction of a chip that it is.

    Raises:
      ValueError: the compiler for that kind of chip is not installed.
    """
    chip = chip_named(name)
    devices = describe_slice(name, "1x1x1" if chip.platform == "gpu" else chip.topology)
    return devices[0], chip.num_chips / len(devices)


def describe_slice(name: str, topology: str) -> list[Any]:
    """The devices of several connected chips of one kind, to compile for.

    Args:
      name: one of CHIPS.
      topology: for TPUs such as "v6e:2x4"; for GPUs "PARTITIONSxHOSTSxDEVICES", such as "1x1x8".

    Raises:
      ValueError: the compiler for that kind of chip is not installed.
    """
    if chip_named(name).platform == "gpu":
        options = {"target_config": _target_config(name), "topology": topology}
        return _devices("", "cuda", 'pip install "jinfer[cuda13]"', **options)
    # Without these the compiler queries the cloud's metadata, and allows one process only.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return _devices(topology, "tpu", 'pip install "jinfer[tpu]"')


def _devices(name: str, platform: str, remedy: str, **options: str) -> list[Any]:
    try:
        description = topologies.get_topology_desc(name, platform, **options)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"--target needs the compiler for its chips; got none for platform={platform!r} "
            f"({str(error).splitlines()[0]:.120}). Do: {remedy}."
        ) from error
    return list(description.devices)


def _target_config(name: str) -> str:
    """The text form of a GPU's description."""
    chip = CHIPS[name]
    major, minor = chip.topology.split(".")
    cores, shared, shared_block, threads, units, l2_mib, clock_ghz = _GPU_DETAILS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_block}
  threads_per_core_limit: {threads}  core_count: {cores}  fpus_per_core: {units}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth_gb_s * 1e9)}  l2_cache_size: {l2_mib << 20}
  clock_rate_ghz: {clock_ghz}  device_memory_size: {int(chip.memory_gb * 1e9)}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name.upper()}"
"""


def memory_of(program: jax.stages.Compiled) -> Any:
    """A compiled program's memory figures; all backends in use have them."""
    memory = program.memory_analysis()
    assert memory is not None, "the backend has no memory analysis"
    return memory


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Turns the cache off: it cannot read back a program that was compiled without its device."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it checks whether it is enabled only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()

"""Names the machine, device and versions that figures belong to."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from jinfer import __version__


def versions() -> dict[str, str | int]:
    """Versions and processor, for the JSON file."""
    said: dict[str, str | int] = {
        "jinfer": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "num_processors": os.cpu_count() or 1,
    }
    for package in ("libtpu", "jax-cuda13-plugin"):
        try:
            said[package] = version(package)
        except PackageNotFoundError:
            continue
    return said


def devices() -> dict[str, str | int]:
    """Devices for the JSON file, if JAX has started them anyway."""
    return {"device": jax.devices()[0].device_kind, "num_devices": jax.device_count()}


def machine_line(*, with_device: bool = True) -> str:
    """One line above a table.

    Args:
      with_device: also name the device, which JAX then starts.
    """
    said = versions()
    packages = [f"{name} {said[name]}" for name in ("libtpu", "jax-cuda13-plugin") if name in said]
    device = f"{jax.devices()[0].device_kind}; " if with_device else ""
    return (
        f"{device}{processor()}, {os.cpu_count()} processors, Python {platform.python_version()}\n"
        + ", ".join([f"jinfer {__version__}", f"jax {jax.__version__}", *packages])
    )


def processor() -> str:
    """The processor's model name, if the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

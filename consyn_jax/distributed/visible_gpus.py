"""The GPUs that this process can use, by UUIDs that are the same in all processes of the host.

The index of a GPU does not identify it: if Slurm gives each process its own GPU through a control
group, as with `--gpus-per-task=1`, every process sees a GPU 0. So the GPUs are found in files of
NVIDIA's driver, which list all GPUs of the host. A process can use the GPUs whose device files it
can open. CUDA is not queried, because it must not start before JAX.
"""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")  # a directory for each GPU, named by its PCI bus id
DEVICES = Path("/dev")


def visible_gpus(driver: Path = DRIVER, devices: Path = DEVICES) -> list[str]:
    """UUIDs of the GPUs that this process can use, in the order in which CUDA numbers them.

    The numbers in `CUDA_VISIBLE_DEVICES` are indices into the GPUs that the process may open,
    sorted by PCI bus id. CUDA sorts by speed, which is the same order if all GPUs of the host are
    equal. If the driver's list does not give the UUID of a GPU, a name replaces it: the entry in
    `CUDA_VISIBLE_DEVICES`, the PCI bus id, or the name of the device file.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    usable = _usable(driver, devices)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return usable or sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    listed = (name.strip() for name in visible.split(",") if name.strip())
    names = takewhile(lambda name: not name.startswith("-"), listed)  # CUDA stops reading there
    return [
        usable[int(name)] if name.isdecimal() and int(name) < len(usable) else name
        for name in names
    ]


def _usable(driver: Path, devices: Path) -> list[str]:
    """UUIDs of the GPUs whose device files this process may open, in order of PCI bus id."""
    found = []
    for path in sorted(driver.glob("*/information")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        if minor is None or not _opens(devices / f"nvidia{minor[1]}"):
            continue
        uuid = re.search(r"^GPU UUID:\s*(GPU-\S+)", text, re.MULTILINE)
        # The UUID consists of question marks until the driver has first read the GPU.
        found.append(uuid[1] if uuid and "?" not in uuid[1] else path.parent.name)
    return found


def _opens(device: Path) -> bool:
    """Whether this process can open the device file, which a control group can forbid."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True

"""List the devices that can be named."""

from __future__ import annotations


def show_devices() -> None:
    """Print this machine's device and those of the list: memory, and what is left of it for a run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lightning_memtrain.core import GIB
    from lightning_memtrain.tracing.device import PRESETS, Device

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Device", overflow="fold")
    for name in ("Total GiB", "Usable GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Total as shown by", overflow="fold")
    here = Device.here()
    for device in (here, *PRESETS):
        name = f"{device.name} (here)" if device is here else device.name
        sizes = (f"{size / GIB:.2f}" for size in (device.total_bytes, device.usable_bytes))
        table.add_row(name, *sizes, device.source)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "Usable: without the CUDA context, estimated as 0.50 GiB, and, where the total is not as torch shows "
        "it, without 3 % that the driver keeps."
    )

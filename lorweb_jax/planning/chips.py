"""What accelerators can do, as their makers publish it: the peak rates that a plan's roofline is made of."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. `memory` in bytes that programs can have, `flops` dense bfloat16 a second, `bandwidth` of its memory
    and `interconnect` of all its connections to other chips together, one way, in bytes a second. `host` is what it
    reads of the host's memory in a second: assumed, as it depends on the machine. `variant` is the name of libtpu's
    config for it."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    variant: str = "default"
    host: float = 25e9  # four fifths of the 31.5 GB/s of PCIe 4.0 x16

    def share(self, devices: int) -> "Chip":
        """What one of `devices` that jax sees on a chip has of it."""
        return dataclasses.replace(
            self,
            memory=self.memory / devices,
            flops=self.flops / devices,
            bandwidth=self.bandwidth / devices,
            interconnect=self.interconnect / devices,
            host=self.host / devices,
        )


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: "peak compute per chip (bf16)" and "HBM bandwidth". Links:
# "bidirectional ICI bandwidth per chip" (400, 1200, 800, 1200 GB/s) halved; v4: 2,400 Gbit/s. Memory: of 32, 16, 95,
# 32 and 192 GiB what libtpu 0.0.52 says is available to programs when it refuses one.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.5 * GIB, 275e12, 1228e9, 300e9, "megacore"),  # both cores of a chip are one device
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
        Chip("v5p", 95.73 * GIB, 459e12, 2765e9, 600e9),
        Chip("v6e", 31.24 * GIB, 918e12, 1640e9, 400e9),
        Chip("tpu7x", 2 * 94.74 * GIB, 2307e12, 7380e9, 600e9),
    )
}
# NVIDIA's data sheets, SXM forms, dense; NVLink is halved to one way. Memory: what the driver reports of 40, 80, 80,
# 141, 180, 24 and 12 GB, less about half a GiB that a CUDA process takes for itself. GeForce cards have half their rate
# where sums are float32: 128 and 28 multiprocessors x 512 FLOPs x 2.52 and 1.777 GHz. Their connections are PCIe 4.0's.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("a100-40", 39.0 * GIB, 312e12, 1555e9, 300e9),
        Chip("a100-80", 79.2 * GIB, 312e12, 2039e9, 300e9),
        Chip("h100", 79.1 * GIB, 989e12, 3350e9, 450e9),
        Chip("h200", 139.9 * GIB, 989e12, 4800e9, 450e9),
        Chip("b200", 178.0 * GIB, 2250e12, 7700e9, 900e9),
        Chip("rtx4090", 23.4 * GIB, 165e12, 1008e9, 31.5e9),
        Chip("rtx3060", 11.5 * GIB, 25.5e12, 360e9, 31.5e9),
    )
}

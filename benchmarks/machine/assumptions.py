"""The rates that turn counts into times: all that the bounds assume about GPUs.

They change only by what a GPU shows. Sources:

- multiprocessors, clocks, bandwidth, rates of products: NVIDIA's data sheets and architecture papers (A100, GA102, H100
  and H200, Ada, Blackwell, RTX Blackwell). Dense bfloat16 products, sums in float32.
- instructions issued, special functions, bytes of shared memory a clock, what a multiprocessor holds: CUDA C++
  Programming Guide, "Arithmetic Instructions" and "Technical Specifications per Compute Capability".
- mma.sync on Hopper, 62.9 % of the peak: Luo et al., *Benchmarking and Dissecting the Nvidia Hopper GPU Architecture
  through Microbenchmarking*, arXiv:2402.13499. Datacentre Blackwell is assumed to do the same a clock.
- what is reached: 790 TFLOP/s of library products and 4.3 TB/s were seen on an H200, 0.8 and 0.9 of its data sheet.
  The others are assumed to reach the same shares.
- L2, assumed: 24 bytes a clock and multiprocessor of datacentre chips, which is 5.6 TB/s on an H200 (5.5 to 7 are
  reported of Hopper), and 16 of the others.
"""

from dataclasses import dataclass

# instructions, results of special functions, and bytes of shared memory a clock and multiprocessor, of all targets
ISSUED = 4
SPECIAL = 16
SHARED_BYTES = 128
# shares of the data sheet
PRODUCTS_REACHED = 0.8
BANDWIDTH_REACHED = 0.9
# a multiprocessor's registers, which a warp takes in units, and what each program's shared memory grows by
REGISTERS = 65536
REGISTER_UNIT = 256
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Gpu:
    """The GPU that stands for a target.

    Attributes:
        clock: GHz under load.
        products: bfloat16 TFLOP/s of the data sheet.
        bandwidth: TB/s of device memory of the data sheet.
        l2_bytes: a clock and multiprocessor.
        multiply_adds: a clock and multiprocessor by matrix instruction.
        threads, programs, shared: what a multiprocessor holds at most; shared memory in bytes.
    """

    name: str
    multiprocessors: int
    clock: float
    products: float
    bandwidth: float
    l2_bytes: int
    multiply_adds: dict[str, int]
    threads: int
    programs: int
    shared: int

    @property
    def flops_per_s(self) -> float:
        """What library products reach."""
        return PRODUCTS_REACHED * self.products * 1e12

    @property
    def bytes_per_s(self) -> float:
        """What device memory reaches."""
        return BANDWIDTH_REACHED * self.bandwidth * 1e12


_K = 1024
GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 1.41, 312, 2.04, 24, {"HMMA": 1024}, 2048, 32, 164 * _K),
    "sm_86": Gpu("A40", 84, 1.74, 149.7, 0.696, 16, {"HMMA": 512}, 1536, 16, 100 * _K),
    "sm_89": Gpu("L40S", 142, 2.52, 362, 0.864, 16, {"HMMA": 512}, 1536, 24, 100 * _K),
    "sm_90": Gpu("H200 SXM", 132, 1.755, 989, 4.8, 24, {"HGMMA": 2048, "HMMA": 1288}, 2048, 32, 228 * _K),
    "sm_100": Gpu("B200", 148, 1.85, 2250, 8.0, 24, {"UTCHMMA": 4096, "HMMA": 1288}, 2048, 32, 228 * _K),
    "sm_120": Gpu("RTX PRO 6000", 188, 2.617, 503.8, 1.792, 16, {"HMMA": 512}, 1536, 24, 100 * _K),
}

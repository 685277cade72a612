"""Picks the kernels of a device, once, when a trainer or crosscoder is made.

The choice has a name that is logged. There is no fallback: kernels that cannot run are an error.
"""

import torch

from pipeline.numerics.kernels.base import Kernels
from pipeline.numerics.kernels.cpu import CpuKernels
from pipeline.numerics.kernels.reference import ReferenceKernels
from pipeline.numerics.kernels.triton import TritonKernels


def choose_kernels(device: torch.device, name: str = "auto") -> Kernels:
    """The backend for a device: "auto" takes cpu on CPU and triton on CUDA; or one of reference, cpu, triton by name.

    Raises ValueError for an unknown name, or for a backend that cannot run on the device.
    """
    if name == "auto":
        name = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if name == "reference":
        return ReferenceKernels()
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(
                f"expected a CPU device for kernels 'cpu', got device {str(device)!r}: set kernels to auto"
            )
        return CpuKernels()
    if name == "triton":
        return TritonKernels()
    raise ValueError(f"expected kernels auto, reference, cpu or triton, got {name!r}: use one of these names")

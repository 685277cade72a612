"""Which errors mean that memory ran out: no fault of the user's input, and cured by smaller batches."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward pass failed because memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator has no error class of its own; "out of memory" comes from CUDA libraries below torch.
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())

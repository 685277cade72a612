"""How many tokens fit into one forward pass.

The budget of an extraction is found once, from a short forward of the pair and the free memory of its GPUs; where it
was too large, the extraction halves it (extraction/activations.py). The trade-off: budgets are powers of two, so that
two workers of one kind find the same one although their free memory differs a little.
"""

import torch

from pipeline.models.pair import ModelPair

CPU_TOKENS_PER_BATCH = 16_384
"""On a CPU, where larger batches are no faster."""
SMALLEST, LARGEST = 1024, 131_072
_PROBE_TOKENS = 1024
"""Tokens of the probe's one document; a long one, because stored attention scores grow with its square."""
_USED_SHARE = 0.6
"""Of the free memory; the rest is for fragmentation and other lengths than the probe's."""


def automatic_tokens_per_batch(pair: ModelPair) -> int:
    """Tokens of one forward pass that the pair's devices have memory for, padding included; a power of two."""
    devices = {
        parameter.device for decoder in pair.decoders for parameter in decoder.whole.parameters() if parameter.is_cuda
    }
    if not devices:
        return CPU_TOKENS_PER_BATCH
    config = pair.decoders[0].base.config.get_text_config()
    num_tokens = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", _PROBE_TOKENS))
    ids_BT = torch.zeros(1, num_tokens, dtype=torch.int64)
    held = {}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        held[device] = torch.cuda.memory_allocated(device)
    pair.activations(ids_BT, torch.ones_like(ids_BT))
    fitting = []
    for device in devices:
        torch.cuda.synchronize(device)
        used = torch.cuda.max_memory_allocated(device) - held[device]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fitting.append(tokens_that_fit(torch.cuda.mem_get_info(device)[0] + cached, used / num_tokens))
    return min(fitting)


def tokens_that_fit(free_bytes: int, bytes_per_token: float) -> int:
    """The power of two between SMALLEST and LARGEST whose tokens take at most the used share of the free memory."""
    fitting = _USED_SHARE * free_bytes / max(bytes_per_token, 1.0)
    budget = SMALLEST
    while budget * 2 <= min(fitting, LARGEST):
        budget *= 2
    return budget

"""Large tensors worked on piece by piece: on a CPU, what leaves its caches costs more than what is computed."""

import torch

# small enough to stay in a processor's cache, and in the memory that the allocator keeps: larger tensors are new pages
PIECE_BYTES = 2**22


def is_traced() -> bool:
    """Whether a compiler or an exporter reads this pass; either makes more of plain operations than of pieces."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def in_pieces(device: torch.device) -> bool:
    """Whether a pass may work in pieces: on a CPU, without a gradient, and without a tracer to fix their number."""
    return device.type == "cpu" and not torch.is_grad_enabled() and not is_traced()


def piece_length(length: int, nbytes: int) -> int:
    """How many indices of an axis of `length`, which take `nbytes` together, make a piece: at least one."""
    return max(1, length * PIECE_BYTES // max(1, nbytes))

"""Which precision this machine's processor is fast in."""

import time

import torch


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 matrices clearly faster than float32; without instructions
    for it, it is many times slower."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(384, 384, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        times[dtype] = time.perf_counter() - start
    return times[torch.bfloat16] < 0.7 * times[torch.float32]

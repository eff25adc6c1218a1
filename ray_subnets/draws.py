"""Random numbers that are the same on every processor, drawn by as many threads as torch has.

numpy's SFC64 gives the same bits everywhere; `torch.randn` in float32 differs with and without
AVX2. Every `CHUNK` values have a stream of their own, so threads share the work and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # values per stream: enough to keep a thread busy, few enough to share out


def seed_from(generator: torch.Generator) -> int:
    """The next seed of a torch generator (which may live on any device)."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def shuffled(n: int, generator: torch.Generator) -> Tensor:
    """`torch.randperm`: 32-bit integers where they do, which take half the memory and time."""
    small = n <= torch.iinfo(torch.int32).max
    return torch.randperm(n, generator=generator, dtype=torch.int32 if small else torch.int64)


def stream(seed: int, chunk: int) -> np.random.Generator:
    """The source of values `chunk * CHUNK` and following."""
    return np.random.Generator(np.random.SFC64([seed, chunk] if chunk else seed))


def in_chunks(n: int, work: Callable[[int, slice], None]) -> None:
    """Call `work(chunk, slice)` for every chunk of `n` values, by torch's number of threads."""
    pieces = [(i, slice(i * CHUNK, min(n, (i + 1) * CHUNK))) for i in range(-(-n // CHUNK))]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *piece) for piece in pieces]:
            done.result()


def normals(n: int, seed: int) -> Tensor:
    """`(n,)` float32 from Normal(0, 1)."""
    values = np.empty(n, dtype=np.float32)

    def fill(chunk: int, where: slice) -> None:
        stream(seed, chunk).standard_normal(out=values[where], dtype=np.float32)

    in_chunks(n, fill)
    return torch.from_numpy(values)


def uniforms(n: int, seed: int) -> Tensor:
    """`(n,)` float32 from [0, 1), multiples of 2^-24."""
    values = np.empty(n, dtype=np.float32)

    def fill(chunk: int, where: slice) -> None:
        stream(seed, chunk).random(out=values[where], dtype=np.float32)

    in_chunks(n, fill)
    return torch.from_numpy(values)


def coins(n: int, probability: float, seed: int, *, bits: int = 32) -> Tensor:
    """`(n,)` bool, each True with `probability`, rounded to a multiple of 2^-bits (16 or 32).

    Integers are compared, which takes a fraction of `torch.bernoulli`'s time (`make bench`).
    """
    assert bits in (16, 32)
    values = np.empty(n, dtype=np.bool_)
    threshold, per_word = round(probability * 2**bits), 64 // bits

    def fill(chunk: int, where: slice) -> None:
        count = where.stop - where.start
        if threshold in (0, 2**bits):
            values[where] = threshold > 0
            return
        words = stream(seed, chunk).bit_generator.random_raw(-(-count // per_word))
        integers = words.view(f"<u{bits // 8}")[:count]
        np.less(integers, integers.dtype.type(threshold), out=values[where])

    in_chunks(n, fill)
    return torch.from_numpy(values)

"""Images that stay on disk: decoded and augmented a batch at a time, by threads.

Pillow and torchvision do the decoding, cropping and resizing, outside Python's lock, so threads
are enough, and a job that owns a GPU or lives in a Ray actor need not be forked. The random numbers
of a sample come from a generator of its own, so neither the number of threads nor their order
changes anything.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_AHEAD = 2  # batches that are decoded while the network is busy with one
_AT_ONCE = 2**24  # values of one evaluation batch: activations of large images need the memory

# What torchvision's RandomResizedCrop draws: fraction of the area, and width by height.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)

_CPU = torch.device("cpu")

Sample = tuple[int, int | None]
"""a row, and the seed of its augmentation (None: as for evaluation)"""


def pack_names(names: Sequence[str]) -> Tensor:
    """`(N, width)` uint8, filled up with zeros: a million names in 40 MB, and no Python objects."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    width = max(map(len, encoded), default=0)
    joined = bytearray(b"".join(name.ljust(width, b"\0") for name in encoded))
    if not joined:
        return torch.zeros(len(encoded), 0, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8).view(len(encoded), width)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A sequence of image files that looks, as far as needed, like `(N, 3, size, size)` uint8.

    Training sees RandomResizedCrop (and a flip), evaluation the centre of the image.
    """

    folder: str
    """absolute, the same on every machine of a cluster"""
    names: Tensor
    """`(N, width)` uint8: paths below `folder`, see `pack_names`"""
    size: int
    """pixels of each side, as the network sees it"""
    resize: int
    """evaluation: pixels of the shorter side, before the centre is cut out"""
    workers: int = 1
    """threads that decode"""
    device: torch.device = _CPU
    """where decoded images go"""

    dtype = torch.uint8

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.size, self.size))

    def __getitem__(self, index: Tensor) -> ImageFiles:
        """The files of these rows; nothing is decoded."""
        return replace(self, names=self.names[index.cpu()])

    def to(self, device: torch.device) -> ImageFiles:
        """The same files; decoded images go to `device`."""
        return replace(self, device=device)

    def path(self, row: int) -> str:
        """Where image `row` is."""
        name = bytes(self.names[row].tolist()).rstrip(b"\0")
        return f"{self.folder}/{name.decode('utf-8', 'surrogateescape')}"

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order as evaluation sees them, `(n, 3, size, size)` uint8 on the device.

        Args:
            batch_size: at most; fewer where images are large.

        Raises:
            ValueError: a file cannot be read; the message names it.
        """
        most = max(1, min(batch_size, _AT_ONCE // (3 * self.size**2)))
        rows = range(len(self))
        return self.stream(
            [(row, None) for row in rows[start : start + most]]
            for start in range(0, len(rows), most)
        )

    def stream(
        self, batches: Iterable[Sequence[Sample]], *, flip: bool = False
    ) -> Iterator[Tensor]:
        """These batches in order, `(n, 3, size, size)` uint8 on the device.

        Args:
            flip: augmented images are also flipped half of the time.

        Raises:
            ValueError: a file cannot be read; the message names it.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        waiting: deque[list[Future[Tensor]]] = deque()
        try:
            for batch in batches:
                waiting.append([pool.submit(self._decode, *sample, flip) for sample in batch])
                if len(waiting) > _AHEAD:
                    yield self._join(waiting.popleft())
            while waiting:
                yield self._join(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _join(self, parts: list[Future[Tensor]]) -> Tensor:
        images = torch.stack([part.result() for part in parts])
        return images.to(self.device).permute(0, 3, 1, 2)

    def _decode(self, row: int, seed: int | None, flip: bool) -> Tensor:
        """`(size, size, 3)` uint8: as Pillow has it, so that threads leave all copying to it."""
        from torchvision.datasets.folder import pil_loader
        from torchvision.transforms.v2 import functional

        path = self.path(row)
        try:
            image = pil_loader(path)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = "not an image" if "cannot identify" in reason else reason
            raise ValueError(
                f"data.root: cannot read {path} ({reason}); replace or remove the file"
            ) from None
        if seed is None:
            image = functional.resize(image, [self.resize])
            image = functional.center_crop(image, [self.size, self.size])
        else:
            generator = torch.Generator().manual_seed(seed)
            box = crop_box(image.height, image.width, generator)
            image = functional.resized_crop(image, *box, [self.size, self.size])
            if flip and torch.rand(1, generator=generator).item() < 0.5:
                image = functional.horizontal_flip(image)
        return functional.pil_to_tensor(image).permute(1, 2, 0)


def crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels, as torchvision's RandomResizedCrop draws it.

    That class itself draws from the process's generator, which threads cannot share.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(1).uniform_(low, high, generator=generator)

    def start(room: int) -> int:
        return int(torch.randint(room + 1, (1,), generator=generator))

    low, high = torch.log(torch.tensor(_RATIO)).tolist()
    for _ in range(10):
        area = height * width * uniform(*_AREA).item()
        ratio = torch.exp(uniform(low, high)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return start(height - h), start(width - w), h, w
    # Too long or too high an image: the largest box of the nearest allowed shape, in the middle.
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w

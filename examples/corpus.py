"""Text that every machine has: the source of the Python standard library, as bytes.

It is about 30 MB, or 12 MB where the distribution leaves the library's own tests out.
"""

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Of every sixteen blocks of this many bytes one is held out. Whole files as validation text would be the harder test,
# but a few odd ones (tables, generated code) then decide the loss and how it scatters from run to run.
BLOCK_BYTES = 16_384

# Third-party packages differ from machine to machine.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__"})


class CorpusError(Exception):
    """There is no text to train on."""


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # [train bytes] uint8
    validation: Tensor  # [validation bytes] uint8
    files: int
    sha256: str  # of the training bytes, then the validation bytes

    def train_batch(self, batch_size: int, context: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, each [batch_size, context] int64.

        They depend on `seed` and `step` alone, so every recipe reads the same data, also after a resume.
        """
        # torch's CPU generator keeps 32 bits of its seed, too few to hold both numbers apart.
        draw = random.Random(f"{seed}/{step}")
        last = len(self.train) - context - 1
        return _windows(self.train, [draw.randint(0, last) for _ in range(batch_size)], context)

    def validation_batches(self, batches: int, batch_size: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to `batches` batches of windows evenly spaced over the whole validation text, none overlapping."""
        batches = max(1, min(batches, len(self.validation) // (batch_size * context)))
        last = len(self.validation) - context - 1
        offsets = torch.linspace(0, last, batches * batch_size, dtype=torch.float64).long()
        for batch in offsets.chunk(batches):
            yield _windows(self.validation, batch.tolist(), context)


def load_corpus(*roots: Path, minimum_bytes: int = 100_000, block_bytes: int = BLOCK_BYTES) -> Corpus:
    """Read every .py file under the roots, by default the running interpreter's standard library.

    Every sixteenth block of the text is held out for validation. Raises CorpusError if either part is shorter
    than `minimum_bytes`.
    """
    roots = roots or (Path(sysconfig.get_path("stdlib")),)
    paths = [path for root in roots for path in _source_paths(root)]
    # Ten thousand small files of a cold disk take minutes one after the other.
    with ThreadPoolExecutor(16) as readers:
        text = b"".join(readers.map(Path.read_bytes, paths))
    train, validation = bytearray(), bytearray()
    for number, start in enumerate(range(0, len(text), block_bytes)):
        (validation if number % 16 == 8 else train).extend(text[start : start + block_bytes])
    if min(len(train), len(validation)) < minimum_bytes:
        raise CorpusError(
            f"{', '.join(map(str, roots))} holds {len(train)} bytes of Python source to train on and "
            f"{len(validation)} to validate on; at least {minimum_bytes} of each are needed. Is the standard library "
            "installed as source?"
        )
    return Corpus(
        train=torch.frombuffer(train, dtype=torch.uint8),
        validation=torch.frombuffer(validation, dtype=torch.uint8),
        files=len(paths),
        sha256=hashlib.sha256(train + validation).hexdigest(),
    )


def _source_paths(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in EXCLUDED_DIRECTORIES]
        found += (Path(directory, name) for name in names if name.endswith(".py"))
    # A distribution may leave dangling links to its configuration behind.
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _windows(text: Tensor, offsets: list[int], context: int) -> tuple[Tensor, Tensor]:
    windows = torch.stack([text[offset : offset + context + 1] for offset in offsets]).long()
    return windows[:, :-1], windows[:, 1:]

"""Draw thousands of small pictures in one process and tell what grew: memory, open files, files left behind.

    python -m benchmarks.soak                  # 10,000 pictures of a tiny model, about half an hour
    python -m benchmarks.soak 500

Every kind of run takes its turn: text to image, a second pass, image to image, a request that fails.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ldm
from ldm import Edit, Hires, LdmError, Models, Request
from ldm.files import UNFINISHED
from ldm.images import read_picture, save_numbered
from tests.tiny_families import tiny

REQUEST = Request(prompt="a (red:1.2) [cat:dog:0.5]", width=16, height=16, steps=2)


@dataclass(frozen=True)
class Growth:
    """What a process had more of at the end than after its first pictures."""

    megabytes: float  # of resident memory
    open_files: int
    left_behind: int  # files in the folder for temporary ones, and unfinished ones beside the pictures
    seconds: float


def soak(folder: Path, *, pictures: int, warm_up: int) -> Growth:
    """Draw so many pictures into `folder`, after some that fill the caches."""
    models, temporary = tiny("sd1"), tempfile.tempdir
    tempfile.tempdir = str(folder / "temporary")  # which no other process uses
    os.mkdir(tempfile.tempdir)
    try:
        draw(models, folder, warm_up)
        before, begin = measured(folder), time.monotonic()
        draw(models, folder, pictures)
        after = measured(folder)
    finally:
        tempfile.tempdir = temporary
    return Growth(
        megabytes=(after[0] - before[0]) / 1e6,
        open_files=after[1] - before[1],
        left_behind=after[2] - before[2],
        seconds=time.monotonic() - begin,
    )


def draw(models: Models, folder: Path, pictures: int) -> None:
    for i in range(pictures):
        request = replace(REQUEST, seed=i)
        if i % 10 == 3:
            request = replace(request, hires=Hires(scale=1.5))
        if i % 10 == 5:
            with contextlib.suppress(LdmError):
                ldm.txt2img(models, replace(request, prompt="<lora:absent:1>"))
        if i % 10 == 7:
            picture = read_picture(max(folder.glob("*.png")))
            [image] = ldm.img2img(models, replace(request, edit=Edit(strength=0.6)), picture)
        else:
            [image] = ldm.txt2img(models, request)
        for path in sorted(folder.glob("*.png"))[:-5]:  # to look through 10,000 files takes long
            path.unlink()
        save_numbered(image, folder, str(i))


def measured(folder: Path) -> tuple[int, int, int]:
    """Bytes of resident memory, open files, files left behind."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    left_behind = len(os.listdir(tempfile.gettempdir())) + len(list(folder.glob(f".*{UNFINISHED}")))
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), left_behind


def main() -> None:
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        grown = soak(Path(folder), pictures=pictures, warm_up=100)
    print(
        f"{pictures} pictures in {grown.seconds:.0f} s: {grown.megabytes:+.1f} MB, "
        f"{grown.open_files:+d} open files, {grown.left_behind:+d} files left behind"
    )


if __name__ == "__main__":
    main()

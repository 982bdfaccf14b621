"""Build the embedded model's training data from the original icon packages.

    python scripts/build_dataset.py --scope small --out build/data

Needs npm, a connection on the first run, and `pip install -e ".[train]"`. What was fetched and rendered is
kept in --cache, so a stopped build goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flags


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.Parser("build_dataset", __doc__)
    p.add_argument("--scope", choices=("small", "full"), default="small")
    p.add_argument(
        "--size", type=int, metavar="N", help="side in pixels; default: 64 for small, 128 for full"
    )
    p.add_argument(
        "--out", type=Path, default=Path("build/data"), metavar="DIR", help="for the finished file"
    )
    p.add_argument(
        "--cache", type=Path, default=Path("build/icons"), metavar="DIR", help="for packages and pictures"
    )
    p.add_argument("--debug", action="store_true", help="show where an error comes from")
    return p.parse_args(argv)


def build(a: argparse.Namespace) -> int:
    try:
        from ldm.training import artwork
    except ModuleNotFoundError as error:
        from ldm import RequestError

        raise RequestError(f'{error.name} is missing; install it with pip install -e ".[train]"') from None
    from ldm.files import atomic_write

    scope = artwork.SCOPES[a.scope]
    icons = artwork.build(scope, a.size or scope.size, a.cache)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / f"icons-{scope.name}.safetensors"
    icons.save(file)
    with atomic_write(file.with_suffix(".NOTICE.txt"), overwrite=True) as out:
        out.write(artwork.notice(icons.facts).encode())
    held = len(icons.indices(holdout=True))
    print(f"{file}: {len(icons.icons)} pictures {tuple(icons.images.shape[1:])}, {held} of them held out")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return flags.main("build_dataset", parse, build, argv)


if __name__ == "__main__":
    flags.start(main)

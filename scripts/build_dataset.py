"""Build the embedded model's training data from the original icon packages.

    python scripts/build_dataset.py --scope small --out build/data

Needs npm, a connection on the first run, and `pip install -e ".[train]"`. What was fetched and rendered is
kept in --cache, so a stopped build goes on where it was.
"""

import argparse
from pathlib import Path

from ldm.training import artwork


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scope", choices=artwork.SCOPES, default="small")
    parser.add_argument("--size", type=int, help="side in pixels; default: 64 for small, 128 for full")
    parser.add_argument("--out", type=Path, default=Path("build/data"), help="folder of the finished file")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/icons"), help="folder of packages and pictures"
    )
    arguments = parser.parse_args()

    scope = artwork.SCOPES[arguments.scope]
    icons = artwork.build(scope, arguments.size or scope.size, arguments.cache)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"icons-{scope.name}.safetensors"
    icons.save(file)
    file.with_suffix(".NOTICE.txt").write_text(artwork.notice(icons.facts), encoding="utf-8")
    held = len(icons.indices(holdout=True))
    print(f"{file}: {len(icons.icons)} pictures {tuple(icons.images.shape[1:])}, {held} of them held out")


if __name__ == "__main__":
    main()

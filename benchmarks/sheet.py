"""Draw the sheet of 20 prompts: each once, seed 0, default settings, nothing picked.

python -m benchmarks.sheet                               # the model inside the package
python -m benchmarks.sheet --model build/small/x.safetensors --out sheet.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import ldm
from ldm.models import Models

# Fixed before any model could draw them.
PROMPTS = (
    "apple", "dog face", "cat face", "rocket", "pizza", "house", "umbrella", "octopus", "rose", "car",
    "snowman", "guitar", "smiling face", "crying face", "heart", "fish", "tree", "cake", "clock", "sun",
)  # fmt: skip

COLUMNS = 5
SIDE = 128  # pixels of each picture on the sheet
GAP = 12
LABEL = 24  # height of the line under each picture


def draw(models: Models) -> list[Image.Image]:
    """One picture for each prompt."""
    return [ldm.txt2img(models, ldm.Request(prompt=prompt, seed=0))[0] for prompt in PROMPTS]


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """The pictures in rows of COLUMNS, enlarged to SIDE, each above its label."""
    rows = -(-len(pictures) // COLUMNS)
    size = (GAP + COLUMNS * (SIDE + GAP), GAP + rows * (SIDE + LABEL + GAP))
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = GAP + i % COLUMNS * (SIDE + GAP)
        y = GAP + i // COLUMNS * (SIDE + LABEL + GAP)
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + SIDE / 2, y + SIDE + LABEL / 2), label, fill="black", font=font, anchor="mm")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint; default: the embedded model")
    parser.add_argument("--out", type=Path, default=Path("docs/images/sheet.png"))
    arguments = parser.parse_args()
    page = sheet(draw(ldm.load(arguments.model)), PROMPTS)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()

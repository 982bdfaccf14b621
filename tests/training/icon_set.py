"""A few drawings, made here, for the tests of training."""

import torch

from ldm.training.icons import Icon, IconSet

COLOURS = {"red": (220, 30, 40), "green": (40, 160, 60), "blue": (30, 60, 220)}
SHAPES = ("disc", "square", "triangle", "ring")


def icon_set(size: int = 32) -> IconSet:
    """Twelve plain shapes on nothing; the blue ring is kept for testing."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    alphas = {
        "disc": radius < 0.8,
        "square": torch.maximum(x.abs(), y.abs()) < 0.7,
        "triangle": (y < 0.8) & (x < y),  # not its own mirror image
        "ring": (radius < 0.9) & (radius > 0.5),
    }
    images, icons = [], []
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            layers = [torch.full((size, size), level) for level in rgb] + [alphas[shape] * 255]
            images.append(torch.stack(layers).to(torch.uint8))
            icons.append(
                Icon(
                    subject=f"{colour} {shape}",
                    style="plain",
                    family="plain",
                    group="shapes",
                    flip=shape == "triangle",
                    holdout=(shape, colour) == ("ring", "blue"),
                )
            )
    return IconSet(torch.stack(images), icons, {"scope": "test", "sources": ""})

"""Shared test set-up."""

import sys

# diffusers and transformers import torchvision when they see it; a build that does not match torch would
# stop the whole run, and nothing compared here needs it.
sys.modules["torchvision"] = None  # type: ignore[assignment]

import torch  # noqa: E402 - after the line above

# Two threads are the size of the machines the suite is timed on.
torch.set_num_threads(min(2, torch.get_num_threads()))

"""Shared test set-up."""

import os
import sys

# Tests run in one process for each core (pytest -n auto), so each process, and what it starts,
# has one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# diffusers and transformers import torchvision when they see it; a build that does not match torch would
# stop the whole run, and nothing compared here needs it.
sys.modules["torchvision"] = None  # type: ignore[assignment]

import torch  # noqa: E402 - after the lines above

# Two threads are the size of the machines the suite is timed on.
torch.set_num_threads(min(2, torch.get_num_threads()))

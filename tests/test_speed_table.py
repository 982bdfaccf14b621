"""The harness of `make bench`: its page, its verdicts, and weights that make implementations comparable."""

import json
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers_worker import fill, inputs
from benchmarks.speed_table import PAGE, RESULTS, TARGETS, written


def test_the_page_on_speed_says_what_was_measured():
    page = PAGE.read_text()
    assert written(page, json.loads(RESULTS.read_text())) == page, (
        "python -m benchmarks.speed_table writes it"
    )


class Original(nn.Module):
    """Two convolutions and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.second(self.first(x)))


class Renamed(nn.Module):
    """The same, with other names in another order, and a linear layer in place of the 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.b, self.a = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x)).movedim(1, -1)).movedim(-1, 1)


def test_two_implementations_of_a_network_get_the_same_weights():
    results, parameters = [], []
    for network in (Original(), Renamed()):
        network.requires_grad_(False)
        parameters.append(fill(network, partial(network), "encode"))
        results.append(network(*inputs("encode", 2)))
    assert parameters[0] == parameters[1] == sum(p.numel() for p in Original().parameters())
    # Sums of up to 36 numbers, taken in another order: some units of the last place.
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert results[0].std() > 0.1  # the size of what passes is kept


def test_a_target_counts_the_best_peer_and_the_lesser_of_processor_and_clock():
    figures = {
        "optimized": {"cpu": 1.0, "wall": 1.0},
        "diffusers": {"cpu": 2.0, "wall": 2.0},
        "ComfyUI": {"cpu": 1.5, "wall": 1.4},
    }
    against_all, against_diffusers = TARGETS[0], TARGETS[1]
    assert against_all.figure(figures) == 1.4
    assert against_diffusers.figure(figures) == 2.0

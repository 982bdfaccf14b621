"""The training loop: a run in pieces is the run in one, to the bit, and never ends in a spoilt state."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from ldm.errors import LdmError
from ldm.formats import read
from ldm.training.loop import Ema, LoopConfig, Run, averaged, step_generator

CONFIG = LoopConfig(steps=8, lr=1e-2, warmup=2, ema_decay=0.9, save_every=1000)


def network(layout: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3))
    return model.to(memory_format=layout)  # pyright: ignore[reportCallIssue] - not in torch's stubs


def loss_of(model: nn.Module, count: int = 4):
    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randn(count, 3, 9, 9, generator=generator).to(memory_format=torch.channels_last)
        return (model(x) - x[..., 2:-2, 2:-2].square()).square().mean()

    return loss


def run(folder: Path, config: LoopConfig = CONFIG, steps: int | None = None) -> Run:
    """Train up to `steps` of the run (None: all), in a new object that starts from the saved state."""
    model = network()
    made = Run(model, config, folder)
    made.resume()
    loss = loss_of(model)

    def until(generator: torch.Generator) -> Tensor:
        if steps is not None and made.step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the last step: it is finished and saved
        return loss(generator)

    made.train(until, samples_per_step=4)
    return made


@pytest.mark.parametrize("pieces", [(3,), (1, 2, 7)])
def test_a_run_in_pieces_is_the_run_in_one_to_the_bit(tmp_path: Path, pieces: tuple[int, ...]):
    whole = run(tmp_path / "whole")
    for step in pieces:
        assert run(tmp_path / "pieces", steps=step).step == step
    parts = run(tmp_path / "pieces")
    assert (parts.step, whole.step) == (8, 8)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimizer.state[a][key], parts.optimizer.state[b][key])
    for name, value in whole.ema.shadow.items():
        assert torch.equal(value, parts.ema.shadow[name])
    one, other = (read(tmp_path / name / "state.safetensors") for name in ("whole", "pieces"))
    assert one.metadata == other.metadata
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_resumed_optimizer_has_the_memory_layout_of_the_weights(tmp_path: Path):
    # The fused optimizer would otherwise give every weight the moments of another.
    run(tmp_path, steps=3)
    resumed = Run(network(), CONFIG, tmp_path)
    resumed.resume()
    for p in resumed.model.parameters():
        assert resumed.optimizer.state[p]["exp_avg"].stride() == p.stride()
        assert resumed.optimizer.state[p]["exp_avg_sq"].stride() == p.stride()


def test_a_finished_run_does_nothing_more(tmp_path: Path):
    done = run(tmp_path)
    again = run(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True)
    )


def test_time_can_run_out_before_the_first_step(tmp_path: Path):
    model = network()
    made = Run(model, CONFIG, tmp_path)
    assert made.train(loss_of(model), samples_per_step=4, seconds=0.0) is False
    resumed = Run(network(), CONFIG, tmp_path)
    assert resumed.resume()
    assert resumed.step == 0
    assert resumed.train(loss_of(resumed.model), samples_per_step=4)


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}, {"ema_decay": 0.5}, {"weight_decay": 0.1}])
def test_changed_settings_are_refused_by_name(tmp_path: Path, change: dict[str, float]):
    run(tmp_path, steps=2)
    with pytest.raises(LdmError, match=f"another {next(iter(change))};"):
        run(tmp_path, replace(CONFIG, **change))  # pyright: ignore[reportArgumentType]


def test_another_network_is_refused(tmp_path: Path):
    run(tmp_path, steps=2)
    with pytest.raises(LdmError, match="another network;"):
        Run(nn.Conv2d(3, 3, 3), CONFIG, tmp_path).resume()


def test_a_longer_run_may_go_on_from_a_shorter_one(tmp_path: Path):
    run(tmp_path)
    assert run(tmp_path, replace(CONFIG, steps=10)).step == 10


def test_a_damaged_state_is_an_error(tmp_path: Path):
    run(tmp_path, steps=2)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(LdmError, match="state"):
        run(tmp_path)


def test_a_second_request_to_stop_does_not_wait_and_saves_nothing_half_done(tmp_path: Path):
    model = network()
    made = Run(model, CONFIG, tmp_path)
    loss = loss_of(model)

    def interrupted(generator: torch.Generator) -> Tensor:
        if made.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss(generator)

    with pytest.raises(KeyboardInterrupt):
        made.train(interrupted, samples_per_step=4)
    assert not made.state_path.exists()


@pytest.mark.parametrize("save_every", [1, 1000])
def test_a_diverging_run_keeps_its_last_sound_state(tmp_path: Path, save_every: int):
    config = replace(CONFIG, save_every=save_every)
    run(tmp_path, config, steps=3)
    model = network()
    made = Run(model, config, tmp_path)
    made.resume()
    loss = loss_of(model)

    def diverging(generator: torch.Generator) -> Tensor:
        return loss(generator) * (math.inf if made.step == 4 else 1.0)

    with pytest.raises(LdmError, match="diverged"):
        made.train(diverging, samples_per_step=4)
    kept = read(made.state_path)
    assert kept.metadata["step"] == ("4" if save_every == 1 else "3")
    assert all(w.isfinite().all() for w in kept.tensors.values())


def test_what_is_due_every_few_steps_is_done_in_time(tmp_path: Path):
    model = network()
    made = Run(model, CONFIG, tmp_path)
    seen: list[int] = []
    made.train(loss_of(model), samples_per_step=4, every=(3, lambda: seen.append(made.step)))
    assert seen == [3, 6]
    assert model.training
    assert (tmp_path / "loss.csv").read_text().startswith("1,4,")


def test_the_rate_rises_stays_and_decays():
    config = LoopConfig(steps=1000, lr=2.0, warmup=100, decay=0.4)
    rates = [config.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[:100] == sorted(rates[:100])
    assert set(rates[99:600]) == {2.0}
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert config.rate(800) == pytest.approx(1.0)  # half a cosine
    assert 0 < rates[-1] < 1e-4
    assert config.rate(1000) == 0.0
    assert LoopConfig(steps=10, lr=1.0, warmup=0).rate(0) == 1.0


def test_the_average_forgets_the_start_and_then_remembers_long():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, decay=0.99)
    model.weight.data.fill_(1.0)
    expected = 0.0
    for step in range(2000):
        ema.update(model, step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected += (1 - decay) * (1 - expected)
        if step in (0, 1, 50):
            assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert ema.shadow["weight"].item() == pytest.approx(1.0)
    assert torch.equal(averaged(model, ema)["weight"], ema.shadow["weight"])


def test_each_step_and_process_has_its_own_randomness():
    draws = {
        torch.rand(1, generator=step_generator(seed, step, rank)).item()
        for seed in (0, 1)
        for step in (0, 1, 2)
        for rank in (0, 1)
    }
    assert len(draws) == 12


def _train_process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = network()
    Run(model, CONFIG, folder).train(loss_of(model), samples_per_step=8)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort the interpreter while it shuts down (pytorch pull request 179291)


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path):
    spawn(_train_process, (29_000 + os.getpid() % 1000, tmp_path / "two"), nprocs=2)

    model = network()
    made = Run(model, CONFIG, tmp_path / "one")

    def both(_: torch.Generator) -> Tensor:
        losses = [loss_of(model)(step_generator(CONFIG.seed, made.step, rank)) for rank in (0, 1)]
        return (losses[0] + losses[1]) / 2

    made.train(both, samples_per_step=8)
    two = read(tmp_path / "two/state.safetensors").tensors
    for name, p in model.named_parameters():
        # The gradients are summed in another order, and Adam divides small ones by their own size.
        torch.testing.assert_close(two[f"model.{name}"], p.detach(), atol=1e-4, rtol=1e-4)


def test_summands_of_a_loss_are_added_and_groups_have_their_own_rates(tmp_path: Path):
    config = replace(CONFIG, steps=1, lr=0.5, warmup=1, decay=0.0, ema_decay=0.0, clip_norm=math.inf)
    results = []
    for name in ("whole", "summands"):
        model = network()
        first, last = list(model.parameters())[:4], list(model.parameters())[4:]
        groups = [{"params": first, "factor": 0.1}, {"params": last}]
        made = Run(model, config, tmp_path / name, optimizer=torch.optim.SGD(groups, lr=1.0))
        loss = loss_of(model)

        def summands(generator: torch.Generator, loss=loss):
            total = loss(generator)
            yield total / 4
            yield loss(step_generator(config.seed, 0, 0)) * 0.75

        before = [p.detach().clone() for p in model.parameters()]
        made.train(loss if name == "whole" else summands, samples_per_step=4)
        assert [group["lr"] for group in made.optimizer.param_groups] == [0.05, 0.5]
        results.append([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
        assert not [key for key in read(made.state_path).tensors if key.startswith("ema.")]
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_further_settings_are_checked_on_resume(tmp_path: Path):
    model = network()
    Run(model, CONFIG, tmp_path, facts={"data": "a", "size": (1, 2)}).save()
    assert Run(network(), CONFIG, tmp_path, facts={"data": "a", "size": (1, 2)}).resume()
    with pytest.raises(LdmError, match="another data;"):
        Run(network(), CONFIG, tmp_path, facts={"data": "b", "size": (1, 2)}).resume()

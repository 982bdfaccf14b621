"""The measures of the embedded model's evaluation, on cases with known answers."""

import pytest
import torch
from PIL import Image

from benchmarks import evaluate, judge, metrics, sheet
from benchmarks.judge import Judge, JudgeConfig, Verdict
from ldm.errors import LdmError
from ldm.training.icons import Icon, IconSet, composite

STYLES = ("noto", "twemoji")


def icon(subject: str, style: str, holdout: bool = False) -> Icon:
    return Icon(subject=subject, style=style, family=style, group="objects", holdout=holdout)


def bars(things: int) -> IconSet:
    """Every thing in both styles: a bar at the thing's place, whose colour is the style's."""
    images = torch.zeros(2 * things, 4, 64, 64, dtype=torch.uint8)
    icons = []
    for i in range(things):
        for k, style in enumerate(STYLES):
            top = 4 + i * 56 // things
            images[2 * i + k, 3, top : top + 8, 8:56] = 255
            images[2 * i + k, 2 * k, top : top + 8, 8:56] = 220
            icons.append(icon(f"bar {i}", style, holdout=i == 0 and k == 0))
    return IconSet(images, icons, {})


def test_an_interval_holds_the_mean_and_narrows_with_the_root_of_n():
    few = metrics.mean(torch.tensor([0.0, 1.0] * 50))
    many = metrics.mean(torch.tensor([0.0, 1.0] * 200))
    assert few.value == many.value == 0.5
    assert few.low < 0.5 < few.high
    # Normal approximation: 0.5 +- 1.96 * 0.5 / sqrt(n). The bootstrap of 0 and 1 moves in steps of 1 / n.
    assert few.high - few.low == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, abs=0.02)
    assert many.high - many.low == pytest.approx((few.high - few.low) / 2, abs=0.01)


def test_an_interval_is_the_same_each_time():
    values = torch.rand(40, generator=torch.Generator().manual_seed(1))
    assert metrics.mean(values) == metrics.mean(values)


def test_the_ratio_of_a_multiple_is_certain():
    real = torch.rand(60, generator=torch.Generator().manual_seed(2)) + 0.1
    half = metrics.ratio(real / 2, real)
    # Captions are resampled in pairs, so what is hard for both cancels: no uncertainty is left.
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert half.n == 60


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ZeroDivisionError):
        metrics.ratio(torch.ones(5), torch.zeros(5))


def test_nearest_finds_a_copy_and_its_mirror_image():
    references = torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    asked = torch.stack([references[4], references[2].flip(2)])
    distance, position = metrics.nearest(asked, references)
    assert position.tolist() == [4, 2]
    assert distance.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_black_is_at_distance_one_from_white():
    white, black = torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    distance, _ = metrics.nearest(black, white)
    assert distance.item() == pytest.approx(1.0)


def test_psnr_of_an_error_of_one_hundredth_is_40_db():
    x = torch.zeros(2, 3, 8, 8)
    # The range is 2, so an error of 0.02 is one hundredth of it: 20 log10(100) = 40.
    assert metrics.psnr(x, x + 0.02).tolist() == pytest.approx([40.0, 40.0], abs=1e-4)


def test_rank_counts_those_before_the_right_one_and_ties_against_it():
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert judge.rank_of(scores, torch.tensor([0, 1, 0])).tolist() == [0, 2, 2]


def test_a_palette_holds_the_shares_of_colours_but_not_white():
    x = torch.ones(1, 3, 8, 8)
    x[:, :, :2] = -1.0  # a quarter black
    x[:, 1:, 2:3] = -1.0  # half of that red
    colours = judge.palette(x, bins=3)[0].square()
    red = 2 * 3 * 3  # the last of three bins of red, the first of green and of blue
    assert colours[0].item() == pytest.approx(2 / 3)
    assert colours[red].item() == pytest.approx(1 / 3)
    assert colours.sum().item() == pytest.approx(1.0)
    assert judge.palette(torch.ones(1, 3, 8, 8), bins=3).sum() == 0.0  # an empty picture has no colours


@pytest.mark.parametrize(("top5", "style"), [(0.5, 1.0), (1.0, 0.5)])
def test_a_judge_that_cannot_read_real_pictures_refuses_to_judge(top5: float, style: float):
    with pytest.raises(LdmError, match="to judge anything"):
        judge.gate(Verdict(torch.zeros(4), torch.full((4,), top5), torch.full((4,), style)))


def test_a_judge_that_reads_real_pictures_passes():
    judge.gate(Verdict(torch.zeros(4), torch.full((4,), 0.8), torch.full((4,), 0.8)))


def test_a_trained_judge_names_a_picture_it_has_never_seen(tmp_path):
    data = bars(4)
    config = JudgeConfig(width=4, dim=16, bins=4, epochs=80, batch_size=7, dropout=0.0)
    trained = judge.load(data, tmp_path / "judge.safetensors", config)
    held = data.indices(holdout=True)
    pictures, asked = composite(data.images[held]), [data.icons[i] for i in held]
    seen = judge.verdict(trained, pictures, asked)
    assert (seen.top1.item(), seen.style.item()) == (1.0, 1.0)
    other = judge.verdict(trained, pictures, [icon("bar 3", "twemoji")])
    assert (other.top1.item(), other.style.item()) == (0.0, 0.0)

    again = judge.load(data, tmp_path / "judge.safetensors", config)  # read, not trained
    assert torch.equal(trained.look(pictures)[0], again.look(pictures)[0])


def test_names_share_their_words():
    config = JudgeConfig(width=4, dim=8, bins=3)
    one = Judge(config, ["cat", "cat face"], ["noto"])
    assert one.bags == [[0], [0, 1], [2]]


def test_another_split_is_refused():
    with pytest.raises(LdmError, match="held-out pictures of this protocol"):
        evaluate.held_out(bars(3))


def test_scores_are_means_over_the_pictures_of_a_caption():
    judged = Verdict(torch.tensor([1.0, 0, 1, 1]), torch.ones(4), torch.zeros(4))
    assert evaluate.scores(judged, 2)["top1"].tolist() == [0.5, 1.0]
    a, b = icon("a", "noto"), icon("b", "noto")
    assert evaluate.repeated([a, b], 4) == [a, a, b, b]


def test_a_partner_is_the_same_thing_in_a_trained_style():
    data = bars(3)
    (partner,) = evaluate.trained_partners(data, data.indices(holdout=True))
    assert (data.icons[partner].subject, data.icons[partner].style) == ("bar 0", "twemoji")


def test_a_sheet_shows_every_picture_in_its_place():
    colours = [(10 * i, 0, 0) for i in range(len(sheet.PROMPTS))]
    page = sheet.sheet([Image.new("RGB", (64, 64), colour) for colour in colours], sheet.PROMPTS)
    for i, colour in enumerate(colours):
        x = sheet.GAP + i % sheet.COLUMNS * (sheet.SIDE + sheet.GAP) + sheet.SIDE // 2
        y = sheet.GAP + i // sheet.COLUMNS * (sheet.SIDE + sheet.LABEL + sheet.GAP) + sheet.SIDE // 2
        assert page.getpixel((x, y)) == colour

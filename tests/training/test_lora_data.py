"""Pictures for a LoRA: folders and captions, buckets, what is drawn when, and mistakes in one sentence."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.training.lora_data import (
    DataConfig,
    Dataset,
    Example,
    bucket_of,
    bucket_sizes,
    caption,
    examples,
    load_dataset,
    pixels,
    placed,
    tag_frequency,
)
from tests.tiny_families import tiny

SMALL = DataConfig(resolution=64, bucket_step=16, min_bucket=32, max_bucket=128)


def picture(path: Path, size: tuple[int, int] = (40, 30), text: str | None = None) -> Path:
    """A picture whose left half is red and whose right half is blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    image.save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


# --- folders


def test_folders_give_repeats_and_captions(tmp_path: Path):
    picture(tmp_path / "3_a dog/b.png")
    picture(tmp_path / "3_a dog/a.PNG", text=" dog,\n brown ")
    picture(tmp_path / "10_cat_toy/x.jpg", (30, 40))
    (tmp_path / "3_a dog/notes.md").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    found = [(e.path.name, e.caption, e.repeats, e.size) for e in examples(tmp_path)]
    assert found == [
        ("x.jpg", "cat_toy", 10, (30, 40)),
        ("a.PNG", "dog, brown", 3, (40, 30)),
        ("b.png", "a dog", 3, (40, 30)),
    ]


def bad_name(root: Path) -> None:
    picture(root / "dog/a.png")


def no_repeats(root: Path) -> None:
    picture(root / "0_dog/a.png")


def loose(root: Path) -> None:
    picture(root / "a.png")


def empty(root: Path) -> None:
    (root / "1_dog").mkdir()


def not_a_picture(root: Path) -> None:
    (root / "1_dog").mkdir()
    (root / "1_dog/a.png").write_text("<html>")


def bad_caption(root: Path) -> None:
    picture(root / "1_dog/a.png").with_suffix(".txt").write_bytes(b"\xff\xfe\x00d")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (bad_name, "must be named <repeats>_<name>"),
        (no_repeats, "must be named <repeats>_<name>"),
        (loose, "move its pictures into one"),
        (empty, "holds no picture"),
        (not_a_picture, "a.png is not a picture"),
        (bad_caption, "a.txt is not UTF-8"),
    ],
)
def test_bad_folders_are_told_in_one_sentence(tmp_path: Path, spoil, says: str):
    spoil(tmp_path)
    with pytest.raises(LdmError, match=says) as error:
        examples(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_told(tmp_path: Path):
    with pytest.raises(LdmError, match="there is no folder"):
        examples(tmp_path / "nothing")


def test_a_truncated_picture_is_told_by_name(tmp_path: Path):
    path = picture(tmp_path / "1_dog/a.jpg", (300, 200))
    path.write_bytes(path.read_bytes()[:-1000])
    [example] = examples(tmp_path)
    with pytest.raises(LdmError, match=r"a\.jpg is not a picture that can be read: image file is truncated"):
        pixels(example, (64, 48))


# --- buckets


def test_buckets_of_512_are_those_of_the_trainers():
    sizes = bucket_sizes(DataConfig())
    assert (512, 512) in sizes
    assert {(256, 1024), (320, 768), (384, 640), (448, 576), (576, 448), (1024, 256)} <= set(sizes)
    for w, h in sizes:
        assert w % 64 == h % 64 == 0
        assert min(w, h) >= 256
        assert max(w, h) <= 1024
        assert w * h <= 512 * 512
        assert (h, w) in sizes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((100, 110), (512, 512)),
        ((1920, 1080), (704, 320 + 64)),
        ((3000, 4000), (448, 576)),
        ((9000, 100), (1024, 256)),
    ],
)
def test_a_picture_gets_the_bucket_of_its_shape(size: tuple[int, int], bucket: tuple[int, int]):
    chosen = bucket_of(size, DataConfig())
    ratio = size[0] / size[1]
    errors = [abs(w / h - ratio) for w, h in bucket_sizes(DataConfig())]
    assert abs(chosen[0] / chosen[1] - ratio) == min(errors)
    if size != (1920, 1080):
        assert chosen == bucket


def test_without_enlarging_a_small_picture_keeps_its_pixels():
    config = replace(SMALL, upscale=False)
    assert bucket_of((40, 50), config) == (32, 48)
    assert bucket_of((640, 640), config) == (64, 64)
    assert bucket_of((20, 4000), replace(config, max_bucket=4000, resolution=640)) == (16, 4000 // 16 * 16)
    with pytest.raises(LdmError, match="smaller than one step"):
        bucket_of((10, 50), config)


def test_without_buckets_all_are_square():
    assert bucket_of((100, 900), replace(SMALL, buckets=False)) == (64, 64)


def test_pictures_cover_their_bucket_and_are_cut_around_the_centre():
    assert placed((100, 50), (64, 64)) == ((128, 64), (32, 0))
    assert placed((50, 100), (64, 64)) == ((64, 128), (0, 32))
    for size in ((37, 91), (1000, 333), (65, 64)):
        (w, h), (left, top) = placed(size, (64, 48))
        assert w >= 64
        assert h >= 48
        assert 0 <= left <= w - 64
        assert 0 <= top <= h - 48
        assert abs(w / h - size[0] / size[1]) < 0.03 * size[0] / size[1]  # rounded to whole pixels


def test_transparent_parts_are_white_and_cameras_notes_are_heeded(tmp_path: Path):
    folder = tmp_path / "1_dog"
    folder.mkdir()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "a.png")
    lying = Image.new("RGB", (64, 32), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(folder / "b.jpg", exif=exif)
    clear, turned = examples(tmp_path)
    assert pixels(clear, (32, 32)).unique().tolist() == [1.0]
    assert turned.size == (32, 64)
    assert pixels(turned, (32, 64)).shape == (1, 3, 64, 32)


@pytest.mark.parametrize(
    ("name", "given"),
    [("bucket_step", {"bucket_step": 24}), ("resolution", {"resolution": 72, "buckets": False})],
)
def test_sizes_that_the_model_cannot_have_are_told(name: str, given: dict[str, int]):
    with pytest.raises(LdmError, match=f"{name} must be a multiple of 16"):
        DataConfig.fitting(tiny("sd1"), **given)


def test_sizes_follow_the_model():
    config = DataConfig.fitting(tiny("sd1"), flip=None, min_bucket=None)
    assert config == DataConfig()  # Stable Diffusion 1: 512, buckets from 256 to 1024 in steps of 64
    embedded = DataConfig.fitting(tiny("embedded"))
    assert (embedded.resolution, embedded.bucket_step, embedded.min_bucket, embedded.max_bucket) == (
        64,
        8,
        32,
        128,
    )


# --- captions


def test_kept_tags_stay_in_front_and_the_others_are_mixed():
    config = replace(SMALL, shuffle_caption=True, keep_tokens=2)
    rng = random.Random(0)
    seen = {caption("a, b, c, d, e", config, rng) for _ in range(200)}
    assert len(seen) == 6
    assert all(text.startswith("a, b, ") and sorted(text.split(", ")) == list("abcde") for text in seen)


def test_tags_and_captions_are_dropped_as_often_as_asked():
    rng = random.Random(0)
    config = replace(SMALL, caption_dropout=0.25, tag_dropout=0.5, keep_tokens=1)
    seen = [caption("a, b, c", config, rng) for _ in range(4000)]
    assert seen.count("") / 4000 == pytest.approx(0.25, abs=0.03)  # four standard deviations
    told = [text.split(", ") for text in seen if text]
    assert all(tags[0] == "a" for tags in told)
    assert sum("b" in tags for tags in told) / len(told) == pytest.approx(0.5, abs=0.04)


def test_a_caption_that_is_not_touched_stays_as_written():
    assert caption("a  photo,of a (dog)", SMALL, random.Random(0)) == "a  photo,of a (dog)"


def test_tags_are_counted_by_folder(tmp_path: Path):
    picture(tmp_path / "1_dog/a.png", text="dog, brown")
    picture(tmp_path / "1_dog/b.png", text="dog")
    picture(tmp_path / "2_cat/c.png")
    assert tag_frequency(examples(tmp_path)) == {"1_dog": {"dog": 2, "brown": 1}, "2_cat": {"cat": 1}}


# --- what is drawn


def dataset(counts: list[tuple[tuple[int, int], int, bool]]) -> Dataset:
    """(bucket, repeats, prior) of each picture."""
    items = [
        Example(Path(f"{i}.png"), str(i), "1_x", repeats, prior, bucket)
        for i, (bucket, repeats, prior) in enumerate(counts)
    ]
    latents = [torch.zeros(1, 4, h // 8, w // 8).half() for (w, h), _, _ in counts]
    return Dataset(SMALL, items, [bucket for bucket, *_ in counts], latents, "")


WIDE, TALL = (96, 32), (32, 96)


def test_every_picture_comes_as_often_as_its_repeats_in_batches_of_one_bucket():
    data = dataset([(WIDE, 3, False), (WIDE, 2, False), (TALL, 4, False)])
    orders = [data.batches(2, seed=0, epoch=epoch) for epoch in range(5)]
    for batches in orders:
        assert Counter(i for batch in batches for i in batch) == {0: 3, 1: 2, 2: 4}
        assert all(len({data.buckets[i] for i in batch}) == 1 for batch in batches)
        assert len(batches) == 3 + 2  # ceil(5 / 2) + ceil(4 / 2)
    assert len({str(batches) for batches in orders}) > 1
    assert data.batches(2, 0, 3) == orders[3]
    assert any(data.batches(2, 1, epoch) != orders[epoch] for epoch in range(5))


def test_as_many_prior_pictures_as_others():
    few = dataset([(WIDE, 5, False), (WIDE, 1, True), (TALL, 1, True)])
    assert Counter(few.samples) == {0: 5, 1: 3, 2: 2}
    many = dataset([(WIDE, 2, False)] + [(WIDE, 1, True)] * 9)
    assert Counter(many.samples) == {0: 2, 1: 1, 2: 1}


def test_latents_are_of_the_picture_and_of_its_mirror_image(tmp_path: Path):
    picture(tmp_path / "1_dog/a.png", (64, 64))
    models = tiny("embedded")
    data = load_dataset(models, replace(SMALL, flip=True), tmp_path)
    x = pixels(data.examples[0], (64, 64))
    assert models.vae is not None
    for view, expected in zip(data.latents[0], (x, x.flip(3)), strict=True):
        with torch.no_grad():
            assert torch.equal(view, models.vae.encode(expected)[0].half())
    rng = random.Random(0)
    seen = [torch.equal(data.draw(0, rng).z, data.latents[0][0].float()) for _ in range(200)]
    assert 70 < sum(seen) < 130


def test_the_crop_is_told_also_of_a_mirrored_picture(tmp_path: Path):
    picture(tmp_path / "1_dog/a.png", (101, 64))  # 37 pixels too wide: 18 go on the left, 19 on the right
    data = load_dataset(tiny("embedded"), replace(SMALL, flip=True, buckets=False), tmp_path)
    rng = random.Random(0)
    corners = {data.draw(0, rng).picture.corner for _ in range(50)}
    assert corners == {(18, 0), (19, 0)}
    assert data.draw(0, rng).picture.original == (101, 64)


def test_latents_are_kept_until_the_pictures_change(tmp_path: Path):
    path = picture(tmp_path / "data/1_dog/a.png")
    cache = tmp_path / "latents.safetensors"

    def load(config: DataConfig = SMALL) -> Dataset:
        return load_dataset(tiny("embedded"), config, tmp_path / "data", cache=cache)

    first, written = load(), cache.read_bytes()
    again = load()
    assert torch.equal(first.latents[0], again.latents[0])
    assert (first.digest, written) == (again.digest, cache.read_bytes())
    path.with_suffix(".txt").write_text("another caption")
    assert load().digest != first.digest
    assert cache.read_bytes() == written
    picture(path, (30, 40))
    changed = load()
    assert changed.latents[0].shape != first.latents[0].shape
    assert cache.read_bytes() != written

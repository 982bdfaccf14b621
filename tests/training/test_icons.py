"""The embedded model's data: what training reads, what the drawings are called, how they are made."""

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.errors import LdmError
from ldm.training.artwork import SCOPES, everyday, notice, render, rendered, split
from ldm.training.clipart import public_domain_title
from ldm.training.icons import BACKGROUNDS, WHITE, Icon, IconSet, caption, composite
from ldm.training.names import Name, Names, code, plain, slug
from ldm.training.sources import KEYWORDS, NAMES, SOURCES, Drawing, Source, drawings, fetch

APPLE = Icon(
    subject="red apple", short="apple", tags=("fruit", "ripe"), keywords=("fruit",),
    style="emojione", family="emojione", group="food",
)  # fmt: skip

# The prompts of the evaluation sheet, as the drawings are named.
SHEET = {
    "red apple", "green apple", "dog face", "cat face", "rocket", "pizza", "house", "umbrella", "octopus",
    "rose", "automobile", "snowman", "guitar", "slightly smiling face", "grinning face", "crying face",
    "red heart", "fish", "deciduous tree", "evergreen tree", "birthday cake", "shortcake", "alarm clock",
    "mantelpiece clock", "sun",
}  # fmt: skip


def svg(body: str, size: str = 'width="32" height="32" viewBox="0 0 32 32"') -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>'.encode()


# --- icons: the file, captions, backgrounds


def test_icon_set_survives_the_file_and_is_written_the_same_every_time(tmp_path: Path) -> None:
    images = torch.randint(
        0, 256, (2, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    icons = [APPLE, Icon(subject="piñata", style="noto", family="noto", group="objects", holdout=True)]
    IconSet(images, icons, {"scope": "small", "sources": "a@1"}).save(tmp_path / "a.safetensors")
    back = IconSet.load(tmp_path / "a.safetensors")
    assert torch.equal(back.images, images)
    assert back.icons == icons
    assert back.facts == {"scope": "small", "sources": "a@1"}
    assert (back.indices(holdout=False), back.indices(holdout=True)) == ([0], [1])
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"images": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LdmError, match="not an icon set"):
        IconSet.load(tmp_path / "other.safetensors")


def test_composite_is_the_alpha_weighted_mean_of_drawing_and_background() -> None:
    images = torch.zeros(2, 4, 1, 3, dtype=torch.uint8)
    images[:, 0] = 255  # red, seen through ...
    images[:, 3, 0] = torch.tensor([0, 51, 255])  # ... an alpha of 0, 1/5, 1
    white, blue = composite(images, [WHITE, (0, 0, 255)])
    torch.testing.assert_close(white[:, 0].T, torch.tensor([[1.0, 1, 1], [1, 0.6, 0.6], [1, -1, -1]]))
    torch.testing.assert_close(blue[:, 0].T, torch.tensor([[-1.0, -1, 1], [-0.6, -1, 0.6], [1, -1, -1]]))
    torch.testing.assert_close(composite(images), torch.stack([white, white]))


def test_captions_keep_their_shares() -> None:
    rng = random.Random(0)
    n = 20_000
    texts = Counter(caption(APPLE, rng) for _ in range(n))

    def share(*parts: str) -> float:
        return sum(count for text, count in texts.items() if any(part in text for part in parts)) / n

    # Three standard deviations of a share at n = 20,000 are at most 0.011.
    assert share(", emojione style") == pytest.approx(0.70, abs=0.011)
    assert share("an emojione icon of ") == pytest.approx(0.15, abs=0.011)
    subjects = Counter()
    for text, count in texts.items():
        subjects[text.removeprefix("an emojione icon of ").removesuffix(", emojione style")] += count
    assert subjects["fruit"] / n == pytest.approx(0.12, abs=0.011)
    assert (subjects["apple"] + subjects["red apple"]) / n == pytest.approx(0.70, abs=0.011)
    assert subjects["apple"] / n == pytest.approx(0.35, abs=0.011)
    assert {"apple, ripe, fruit", "red apple, ripe"} < set(subjects)


def test_a_caption_names_the_background_it_is_told() -> None:
    assert len(set(BACKGROUNDS.values()) - {WHITE}) == 11
    rng = random.Random(0)
    assert all(caption(APPLE, rng, name).endswith(f", {name} background") for name in BACKGROUNDS)
    assert not any("background" in caption(APPLE, rng) for _ in range(100))


# --- names


def entry(label: str, hexcode: str, emoji: str, group: int, *tags: str) -> dict:
    return {"label": label, "hexcode": hexcode, "emoji": emoji, "group": group, "tags": list(tags)}


@pytest.fixture
def names() -> Names:
    entries = [
        entry("red apple", "1F34E", "🍎", 4, "apple", "fruit", "ripe"),
        entry("dog face", "1F436", "🐶", 3, "dog", "pet", "adorbs"),
        entry("beach with umbrella", "1F3D6-FE0F", "🏖️", 5),
        entry("flag: Estonia", "1F1EA-1F1EA", "🇪🇪", 9),
        entry("keycap: 1", "0031-FE0F-20E3", "1️⃣", 8),
    ]
    groups = {"3": "animals-nature", "4": "food-drink", "5": "travel-places", "8": "symbols", "9": "flags"}
    others = {"🍎": ["red_apple", "fruit", "mac"], "🐶": ["pet", "woof"]}
    return Names(entries, groups, {"1F3D6": "BEACH WITH UMBRELLA"}, others)


def test_names_are_plain_words() -> None:
    assert plain("Man’s “best” shoe") == "man's best shoe"
    assert plain("flag: Estonia") == plain("flag for Estonia") == "flag of estonia"
    assert slug("Man’s Shoe") == "mans-shoe"
    assert code("1F3D6-FE0F") == "1f3d6"


def test_tags_add_to_the_name_and_keywords_are_agreed(names: Names) -> None:
    assert names.by_code["1f34e"] == Name("red apple", "food", "apple", ("fruit", "ripe"), ("fruit",))
    assert names.by_slug["dog-face"] == Name("dog face", "animals", "", ("pet", "adorbs"), ("dog", "pet"))
    assert not any("keycap" in name.subject for name in names.by_code.values())


def test_joined_names_are_split_into_known_words(names: Names) -> None:
    assert names.split("redapple") == "red-apple"
    assert names.split("umbrellabeach") == "umbrella-beach"
    assert names.split("umbrellax") is None


# --- sources


def tarball(file: Path, members: Mapping[str, object]) -> None:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def source(style: str) -> Source:
    return next(source for source in SOURCES if source.style == style)


def test_an_icon_pack_is_read_by_code_point_by_name_and_by_alias(names: Names, tmp_path: Path) -> None:
    pack = {
        "width": 36,
        "height": 36,
        "icons": {
            "pomme": {"body": "<a/>"},  # named by its code point
            "dog-face": {"body": "<b/>", "width": 72},  # by its own key
            "parasol": {"body": "<c/>"},  # by another spelling
            "tomato": {"body": "<d/>"},  # unknown to the list of names: its key is its name
            "old": {"body": "<e/>", "hidden": True},
            "waving-hand-dark-skin-tone": {"body": "<f/>"},
            "keycap-2": {"body": "<g/>"},
        },
        "aliases": {
            "beach-with-umbrella": {"parent": "parasol"},
            "mirrored": {"parent": "pomme", "hFlip": True},
        },
    }
    packed = {
        "icons.json": pack,
        "chars.json": {"1f34e": "pomme"},
        "metadata.json": {"categories": {"Food": ["tomato"]}},
    }
    tarball(tmp_path / f"{source('noto').file}.tgz", packed)
    found = {drawing.key: drawing for drawing in drawings(source("noto"), names, tmp_path)}
    assert {key: (d.name.subject, d.name.group) for key, d in found.items()} == {
        "dog-face": ("dog face", "animals"),
        "parasol": ("beach with umbrella", "travel"),
        "pomme": ("red apple", "food"),
        "tomato": ("tomato", "food"),
    }
    assert b'width="72" height="36" viewBox="0 0 72 36"><b/></svg>' in found["dog-face"].data


def test_packs_with_their_own_spelling_are_understood(names: Names, tmp_path: Path) -> None:
    keys = {"circle": ["ee", "xx"], "firefox": ["redapple", "qwerty"], "streamline": ["dog-face-2"]}
    expected = {"circle": ["flag of estonia"], "firefox": ["red apple"], "streamline": ["dog face"]}
    for style, icons in keys.items():
        tarball(
            tmp_path / f"{source(style).file}.tgz",
            {"icons.json": {"icons": {k: {"body": ""} for k in icons}}},
        )
        assert [d.name.subject for d in drawings(source(style), names, tmp_path)] == expected[style]


def test_webp_drawings_are_named_by_code_point(names: Names, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGBA", (8, 4), (255, 0, 0, 255)).save(picture, "webp", lossless=True)
    webp = {f"assets/{name}.webp": picture.getvalue() for name in ("1f34e", "1f3d6-fe0f", "1f44b-1f3fb")}
    tarball(tmp_path / f"{source('fluent 3d').file}.tgz", webp)
    found = list(drawings(source("fluent 3d"), names, tmp_path))
    assert [drawing.name.subject for drawing in found] == ["red apple", "beach with umbrella"]
    pixels = np.asarray(render(found[0].data, 64))
    assert pixels.shape == (64, 64, 4)
    assert pixels[32, 32].tolist() == [255, 0, 0, 255]


def test_a_missing_npm_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LdmError, match=r"npm could not fetch emojilib@4\.0\.3"):
        fetch(KEYWORDS, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tgz"))


def test_clip_art_needs_a_dedication_and_a_telling_title() -> None:
    def drawing(title: str, licence: str = "http://web.resource.org/cc/PublicDomain") -> bytes:
        rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
        work = f'<c:Work><d:title>{title}</d:title><c:license r:resource="{licence}"/></c:Work>'
        return svg(
            f'<metadata><r:RDF xmlns:r="{rdf}" xmlns:c="urn:c" xmlns:d="urn:d">{work}</r:RDF></metadata>'
        )

    assert public_domain_title(drawing("Big-truck 2")) == "big truck"
    assert public_domain_title(drawing("Big truck", "http://creativecommons.org/licenses/GPL/2.0/")) is None
    assert public_domain_title(drawing("Part of the Icon Collection (Wed Aug 25)")) is None
    assert public_domain_title(svg("<rect/>")) is None
    assert public_domain_title(b"<svg") is None


# --- artwork


@pytest.mark.parametrize("size", [64, 128])
def test_a_drawing_is_centred_and_fills_94_percent(size: int) -> None:
    """Twice as wide as high, off-centre in its own box. One pixel of tolerance for anti-aliased edges."""
    pixels = np.asarray(render(svg('<rect x="1" y="20" width="12" height="6" fill="#00f"/>'), size))
    rows, columns = np.nonzero(pixels[:, :, 3].max(1))[0], np.nonzero(pixels[:, :, 3].max(0))[0]
    assert len(columns) == pytest.approx(0.94 * size, abs=1.5)
    assert len(rows) == pytest.approx(0.47 * size, abs=1.5)
    assert rows[0] + rows[-1] == pytest.approx(size - 1, abs=1)
    assert columns[0] + columns[-1] == pytest.approx(size - 1, abs=1)
    assert pixels[size // 2, size // 2].tolist() == [0, 0, 255, 255]


def test_edges_keep_their_colour() -> None:
    """Straight alpha: a red disc's half-covered edge is red, not dark red, so it fits every background."""
    pixels = np.asarray(render(svg('<circle cx="16" cy="16" r="12" fill="#f00"/>'), 64)).astype(int)
    edge = (pixels[:, :, 3] > 32) & (pixels[:, :, 3] < 224)
    assert edge.sum() > 50
    assert pixels[edge][:, 0].min() > 250
    assert pixels[edge][:, 1:3].max() < 5


def test_drawings_in_millimetres_are_drawn() -> None:
    size = 'width="10mm" height="10mm" viewBox="0 0 10 10"'
    assert np.asarray(render(svg('<rect width="10" height="10"/>', size), 64))[:, :, 3].mean() > 200


def test_an_empty_drawing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        render(svg(""), 64)


def test_what_was_rendered_is_kept(tmp_path: Path) -> None:
    drawing = Drawing(SOURCES[0], "dot", Name("dot", "symbols"), svg('<circle cx="9" cy="9" r="5"/>'))
    first = np.asarray(rendered(drawing, 32, tmp_path))
    spoilt = Drawing(SOURCES[0], "dot", drawing.name, b"no drawing")
    assert np.array_equal(np.asarray(rendered(spoilt, 32, tmp_path)), first)


def drawn(subject: str, *styles: str) -> list[Icon]:
    families = {source.style: source.family for source in SOURCES}
    return [Icon(subject=subject, style=s, family=families[s], group="objects") for s in styles]


def test_the_split_holds_out_one_family_of_a_third_of_the_things() -> None:
    styles = ("fluent", "fluent flat", "noto", "twemoji", "emojione", "firefox")  # five families
    icons = [icon for i in range(900) for icon in drawn(f"thing {i}", *styles)]
    held: dict[str, set[str]] = {}
    for icon in split(icons, families=5):
        if icon.holdout:
            held.setdefault(icon.subject, set()).add(icon.style)
    assert len(held) == pytest.approx(300, abs=42)  # three standard deviations
    assert {frozenset(styles) for styles in held.values()} == {
        frozenset({"fluent", "fluent flat"}),
        *(frozenset({style}) for style in styles[2:]),
    }
    alone = [icon for subject in ("thing 1", "thing 2", "thing 3") for icon in drawn(subject, *styles)]
    assert [i.holdout for i in split(alone, 5)] == [i.holdout for i in split(icons, 5)[6:24]]
    assert not any(icon.holdout for icon in split(icons, families=6))


def test_the_small_scope_has_the_sheet_in_at_least_three_trained_styles() -> None:
    scope = SCOPES["small"]
    subjects = everyday()
    assert len(subjects) == 329
    assert subjects > SHEET
    icons = [icon for subject in sorted(subjects) for icon in drawn(subject, *(scope.styles or ()))]
    trained = Counter(icon.subject for icon in split(icons, scope.families) if not icon.holdout)
    assert min(trained[subject] for subject in SHEET) >= 3


def test_the_notice_credits_what_was_used_and_nothing_else() -> None:
    text = notice({"sources": ", ".join([source("twemoji").pinned, NAMES.pinned])})
    for words in ("twemoji 1.2.5", "Twitter", "CC-BY-4.0", "https://github.com/jdecked/twemoji", "Unicode"):
        assert words in text
    assert "noto" not in text
    assert "openclipart" not in text

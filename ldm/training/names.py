"""What the drawings are called: Unicode's emoji names and tags, a second keyword list, everyday names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# What people call the things whose official name is long.
SHORT_NAMES = {
    "red apple": "apple", "green apple": "apple", "automobile": "car", "racing car": "race car",
    "taxi": "cab", "delivery truck": "truck", "birthday cake": "cake", "shortcake": "cake",
    "deciduous tree": "tree", "evergreen tree": "tree", "alarm clock": "clock", "mantelpiece clock": "clock",
    "timer clock": "clock", "grinning face": "smiling face", "grinning face with big eyes": "happy face",
    "slightly smiling face": "smiling face", "smiling face with heart-eyes": "face in love",
    "smiling face with sunglasses": "cool face", "face with tears of joy": "laughing face",
    "frowning face": "sad face", "crying face": "sad face", "loudly crying face": "crying face",
    "face screaming in fear": "screaming face", "fearful face": "scared face",
    "astonished face": "surprised face", "smiling face with horns": "devil",
    "smiling face with halo": "angel face", "red heart": "heart", "baby chick": "chick", "honeybee": "bee",
    "lady beetle": "ladybug", "rhinoceros": "rhino", "spiral shell": "shell", "paw prints": "paws",
    "blossom": "flower", "cherry blossom": "flower", "hibiscus": "flower", "four leaf clover": "clover",
    "maple leaf": "leaf", "seedling": "plant", "kiwi fruit": "kiwi", "ear of corn": "corn",
    "hot pepper": "chili pepper", "cheese wedge": "cheese", "hamburger": "burger", "french fries": "fries",
    "cooking": "fried egg", "green salad": "salad", "soft ice cream": "ice cream",
    "chocolate bar": "chocolate", "honey pot": "honey", "glass of milk": "milk", "hot beverage": "coffee",
    "wine glass": "wine", "cocktail glass": "cocktail", "beer mug": "beer", "kitchen knife": "knife",
    "doughnut": "donut", "snow-capped mountain": "mountain", "house with garden": "house",
    "locomotive": "steam train", "fire engine": "fire truck", "bicycle": "bike", "motorcycle": "motorbike",
    "vertical traffic light": "traffic light", "sailboat": "boat", "speedboat": "boat", "airplane": "plane",
    "globe showing americas": "earth", "full moon": "moon", "crescent moon": "moon",
    "cloud with rain": "rain", "cloud with snow": "snow", "cloud with lightning": "thunderstorm",
    "high voltage": "lightning", "jack-o-lantern": "pumpkin",
    "wrapped gift": "gift", "soccer ball": "football", "pool 8 ball": "billiard ball",
    "video game": "game controller", "game die": "dice", "artist palette": "palette", "man's shoe": "shoe",
    "running shoe": "sneaker", "woman's boot": "boot", "graduation cap": "hat", "top hat": "hat",
    "gem stone": "diamond", "headphone": "headphones", "musical keyboard": "piano",
    "mobile phone": "smartphone", "telephone": "phone", "electric plug": "plug",
    "desktop computer": "computer", "television": "tv",
    "magnifying glass tilted left": "magnifying glass", "closed book": "book", "open book": "book",
    "money bag": "money", "package": "box", "wastebasket": "trash can", "locked": "lock",
    "droplet": "water drop", "t-shirt": "shirt", "high-heeled shoe": "high heel",
}  # fmt: skip

# emojibase's groups, and the words other packages use for them.
GROUPS = {
    "smileys-emotion": "smileys", "people-body": "people", "animals-nature": "animals", "food-drink": "food",
    "travel-places": "travel", "activities": "activities", "objects": "objects", "symbols": "symbols",
    "flags": "flags", "nature": "animals", "food": "food", "travel": "travel", "places": "travel",
    "people": "people", "activity": "activities", "smiley-people": "people",
}  # fmt: skip

# The kinds of emoji nobody asks a painter for: keycaps, lettered buttons, squared characters.
_UNWANTED = re.compile(
    r"^keycap|^letter .$|^digit |regional indicator|^japanese .*button|squared|cjk|^input |ideograph|"
    r"\bbutton\b|^\w$|^\d+$"
)

# Words that both lists give to some emoji but that name nothing.
_NO_NAMES = {"black", "comic", "gay", "lgbt", "medium", "outlined", "small", "white"}

_LITTLE_WORDS = {"of", "on", "in", "up", "no", "ok", "go", "tv"}


@dataclass(frozen=True)
class Name:
    """What one drawing shows; the words are those of `icons.Icon`."""

    subject: str
    group: str
    short: str = ""
    tags: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


def slug(text: str) -> str:
    """The form in which icon packages write a name: "Man’s shoe" -> "mans-shoe"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[’']", "", text.lower())).strip("-")


def plain(text: str) -> str:
    """A name as a caption says it: "flag: Estonia" -> "flag of estonia"."""
    text = re.sub("[“”]", "", text.replace("’", "'").lower())
    return " ".join(re.sub("^flag: |^flag for (flag )?", "flag of ", text).replace(":", "").split())


def code(hexcode: str) -> str:
    """An emoji's code points without variation selectors, which packages write or leave out as they like."""
    return hexcode.lower().replace("-fe0f", "")


def wanted(subject: str) -> bool:
    return not _UNWANTED.search(subject)


def described(subject: str, group: str, tags: Iterable[str] = (), others: Iterable[str] = ()) -> Name:
    """A name with the tags that add something; its keywords are the first words that both lists give."""
    inside = set(re.split(r"[^\w']+", subject))
    tags = tuple(tag.lower() for tag in tags if tag.lower() not in inside)
    agreed = [word.lower() for word in others if word.lower() in tags and word.lower() not in _NO_NAMES]
    if group == "animals" and subject.endswith(
        " face"
    ):  # "dog face" is also a dog, though "dog" is the animal
        agreed.insert(0, subject.removesuffix(" face"))
    return Name(subject, group, SHORT_NAMES.get(subject, ""), tags, tuple(dict.fromkeys(agreed))[:4])


class Names:
    """Every wanted emoji's name, found by code point ("1f34e") or by the slug of its label ("red-apple")."""

    def __init__(
        self,
        entries: Iterable[Mapping[str, Any]],
        group_keys: Mapping[str, str],
        unicode_names: Mapping[str, str],
        others: Mapping[str, list[str]],
    ) -> None:
        """emojibase's data.json, groups of meta/groups.json and unicode-names.json, and emojilib's list."""
        self.by_code: dict[str, Name] = {}
        self.by_slug: dict[str, Name] = {}
        for entry in entries:
            group = GROUPS.get(group_keys.get(str(entry.get("group")), ""))
            subject = plain(entry["label"])
            if group is None or not wanted(subject):
                continue
            emoji = entry["emoji"]
            keywords = others.get(emoji) or others.get(emoji.replace("\ufe0f", "")) or []
            name = described(subject, group, entry.get("tags", []), keywords)
            self.by_code[code(entry["hexcode"])] = name
            self.by_slug[slug(entry["label"])] = name
        for hexcode, unicode_name in unicode_names.items():  # as older packages say it
            if name := self.by_code.get(code(hexcode)):
                self.by_slug.setdefault(slug(unicode_name), name)

    @cached_property
    def _joined(self) -> dict[str, str]:
        return {key.replace("-", ""): key for key in self.by_slug}

    @cached_property
    def _words(self) -> set[str]:
        words = {word for key in self.by_slug for word in key.split("-")}
        return {word for word in words if len(word) > 2 or word in _LITTLE_WORDS}

    def knows(self, text: str) -> bool:
        """Whether some word of a text occurs in emoji names, in singular or plural."""
        return any({word, word.removesuffix("s"), word + "s"} & self._words for word in slug(text).split("-"))

    def split(self, joined: str) -> str | None:
        """The slug of a name written without separators, "beachumbrella" -> "beach-umbrella".

        Takes the fewest words that occur in emoji names; None if some part is no such word.
        """
        if joined in self._joined:
            return self._joined[joined]
        best: list[list[str] | None] = [[]]  # best[i]: the words of joined[:i]
        for end in range(1, len(joined) + 1):
            splits = [
                [*words, joined[start:end]]
                for start, words in enumerate(best)
                if words is not None and joined[start:end] in self._words
            ]
            best.append(min(splits, key=len, default=None))
        return None if best[-1] is None else "-".join(best[-1])

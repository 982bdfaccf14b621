"""CLIP files of both layouts are read, and words are ranked by their cosine to the picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.clip_vision import ClipVisionConfig, ClipVisionModel
from ldm.errors import CheckpointError, LdmError
from ldm.formats import write_safetensors
from ldm.interrogate import (
    MEAN,
    STD,
    WORDS,
    Category,
    Clip,
    interrogate,
    load_clip,
    prepared,
    rank,
    read_categories,
)
from ldm.text.clip import ClipTextConfig, ClipTextModel
from ldm.text.openclip_names import to_openclip
from scripts import interrogate as script
from tests.tiny_families import tokenizer

TEXT = ClipTextConfig(width=64, layers=1, heads=1, projection_dim=16)
VISION = ClipVisionConfig(
    image_size=28, patch=7, width=64, mlp_width=128, layers=1, heads=1, projection_dim=16
)
RED = Image.new("RGB", (40, 60), (200, 30, 30))


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    text, vision = ClipTextModel(TEXT), ClipVisionModel(VISION)
    for model in (text, vision):
        for weight in model.eval().requires_grad_(False).parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    return Clip(text, vision, tokenizer())


def transformers_layout(clip: Clip) -> dict[str, Tensor]:
    extra = {"logit_scale": torch.tensor(4.6), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {**clip.text.state_dict(), **clip.vision.state_dict(), **extra}


def openclip_layout(clip: Clip) -> dict[str, Tensor]:
    seen = {
        n.replace("vision_model.encoder", "text_model.encoder"): w
        for n, w in clip.vision.state_dict().items()
    }
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm.weight": "ln_pre.weight",
        "vision_model.pre_layrnorm.bias": "ln_pre.bias",
        "vision_model.post_layernorm.weight": "ln_post.weight",
        "vision_model.post_layernorm.bias": "ln_post.bias",
        "visual_projection.weight": "proj",
    }
    visual = {names.get(n, n): w.t() if n == "visual_projection.weight" else w for n, w in seen.items()}
    visual = {f"visual.{n}": w for n, w in to_openclip(visual).items()}
    tensors = {**to_openclip(clip.text.state_dict()), **visual, "logit_scale": torch.tensor(4.6)}
    return {name: w.contiguous() for name, w in tensors.items()}


@pytest.mark.parametrize("layout", [transformers_layout, openclip_layout])
def test_both_layouts_give_the_same_ranking(layout, clip: Clip, tmp_path: Path):
    path = tmp_path / "clip.safetensors"
    write_safetensors(path, layout(clip))
    loaded = load_clip(path, quick_gelu=False)
    assert (loaded.text.config, loaded.vision.config) == (TEXT, VISION)
    words = ["red apple", "dog", "a long phrase of several words"]
    ranked = rank(clip, RED, words)
    for (word, share), (expected, value) in zip(rank(loaded, RED, words), ranked, strict=True):
        assert word == expected
        assert share == pytest.approx(value, abs=1e-5)  # the projection is the transpose of one file's matrix


def test_the_activation_follows_the_layout_unless_told(clip: Clip, tmp_path: Path):
    path = tmp_path / "clip.safetensors"
    write_safetensors(path, transformers_layout(clip))
    quick = load_clip(path)
    assert quick.text.config.quick_gelu
    assert quick.vision.config.quick_gelu
    write_safetensors(path, openclip_layout(clip), overwrite=True)
    assert not load_clip(path).vision.config.quick_gelu


def test_what_is_no_clip_is_refused_in_one_line(clip: Clip, tmp_path: Path):
    path = tmp_path / "clip.safetensors"
    weights = transformers_layout(clip)
    for tensors, why in (
        ({"a": torch.zeros(2)}, "holds no CLIP"),
        (clip.text.state_dict(), "holds no CLIP"),
        ({n: w for n, w in weights.items() if "q_proj.bias" not in n}, "weights are missing"),
        ({**weights, "visual_projection.weight": torch.full((16, 64), torch.nan)}, "NaN"),
        ({**weights, "vision_model.embeddings.patch_embedding.weight": torch.zeros(3)}, "holds no CLIP"),
    ):
        write_safetensors(path, tensors, overwrite=True)
        with pytest.raises(CheckpointError, match=why) as caught:
            load_clip(path)
        assert str(caught.value).startswith("clip.safetensors")
        assert len(str(caught.value)) <= 200


def test_words_are_ranked_by_softmax_of_100_times_the_cosine(clip: Clip):
    words = [f"{i} apples" for i in range(70)]  # more than one batch
    seen, said = clip.see(RED), clip.say(words)
    assert said.shape == (70, 16)
    ranked = rank(clip, RED, words)
    # Each text alone, filled up to all 77 positions, gives the same vector but for rounding.
    padded = torch.tensor([clip.tokenizer.pad(clip.tokenizer.encode(w)) for w in words[:3]])
    alone = clip.text(padded, pooled=True).pooled
    assert alone is not None
    torch.testing.assert_close(said[:3], torch.nn.functional.normalize(alone, dim=1), atol=1e-5, rtol=0)
    shares = dict(ranked)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert [share for _, share in ranked] == sorted(shares.values(), reverse=True)
    cosines = [float(vector.double() @ seen.double()) for vector in said]
    best = max(range(70), key=lambda i: cosines[i])
    assert ranked[0][0] == words[best]
    logit = torch.tensor(cosines[0] - cosines[1]) * 100
    assert shares[words[0]] / shares[words[1]] == pytest.approx(float(logit.exp()), rel=1e-2)


def test_a_prompt_takes_the_best_words_of_each_list(clip: Clip):
    things, colours = ("apple", "dog", "house"), ("red", "blue")
    ranked = [rank(clip, RED, words) for words in (things, colours)]
    categories = [Category("thing", things, top=2), Category("colour", colours)]
    first, second, colour = ranked[0][0], ranked[0][1], ranked[1][0]
    assert interrogate(clip, RED, categories) == f"{first[0]}, {second[0]}, {colour[0]}"
    weighted = interrogate(clip, RED, categories, weights=True)
    assert weighted.startswith(f"({first[0]}:{first[1]:.3f}), (")


def test_lists_are_read_by_name(tmp_path: Path):
    (tmp_path / "b.top2.txt").write_text("\ufeffone\n\n two \none\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(2000))))
    (tmp_path / "c.top.txt").write_text("x")
    a, b, c = read_categories(tmp_path)
    assert (a.name, a.top, len(a.words)) == ("a", 1, 1500)
    assert b == Category("b", ("one", "two"), top=2)
    assert c == Category("c.top", ("x",))
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(LdmError, match=r"no words in d\.txt"):
        read_categories(tmp_path)
    with pytest.raises(LdmError, match="no word lists"):
        read_categories(tmp_path / "nothing")


def test_our_lists_hold_words_of_the_embedded_models_captions():
    thing, style, background = read_categories(WORDS)
    assert {"red apple", "dog", "rocket", "alien", "red heart"} <= set(thing.words)
    assert all(word.endswith(" style") for word in style.words)
    assert "blue background" in background.words


def test_a_picture_is_seen_in_its_middle_square():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste((255, 0, 0), (100, 0, 200, 100))
    pixels = prepared(image, 28)
    assert pixels.shape == (1, 3, 28, 28)
    red = (torch.tensor([1.0, 0, 0]) - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    # The outermost columns take a little of what lies beyond, as in a picture cut after it was made smaller.
    torch.testing.assert_close(pixels[..., 1:-1], red[None, :, None, None].expand(1, 3, 28, 26))
    clear = Image.new("RGBA", (10, 5000), (0, 0, 0, 0))  # what is transparent shows white
    assert torch.allclose(
        prepared(clear, 28)[0, :, 0, 0], (1 - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    )


def test_the_script_prints_one_line_a_picture(clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "clip.safetensors"
    write_safetensors(path, openclip_layout(clip))
    words = tmp_path / "words"
    words.mkdir()
    (words / "thing.txt").write_text("apple\ndog\n")
    RED.save(tmp_path / "red.png")
    expected = rank(replace(clip), RED, ("apple", "dog"))[0][0]
    one = [str(tmp_path / "red.png"), "--clip", str(path), "--words", str(words)]
    assert script.main(one) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert script.main([str(tmp_path / "red.png"), *one, "--weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'red.png'}: ({expected}:0.")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    assert script.main([str(tmp_path / "bad.png"), *one]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "bad.png" in err
    assert script.main([str(tmp_path / "bad.png"), "--clip", str(path)]) == 2

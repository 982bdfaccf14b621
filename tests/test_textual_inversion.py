"""Embeddings are read as the web UI reads them, and act on the text encoder as new words of its table do."""

import json
import re
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.formats import read_tree
from ldm.text.clip import ClipTextConfig, ClipTextModel, Inserted
from ldm.textual_inversion import Embedding, load_folder, read
from tests.golden import golden

FILES = {  # in the order of "read_back_by_a1111"
    "a1111_sd15_3vectors.pt": ("string_to_param", "*"),
    "kohya_sd15_3vectors.safetensors": ("emb_params",),
    "sdxl_2vectors.safetensors": (),
    "diffusers_learned_embeds.bin": ("<demo>",),
}


def sample(name: str) -> Path:
    return golden(f"textual_inversion/{name}")


def encoder(width: int) -> ClipTextModel:
    return ClipTextModel(ClipTextConfig(width=width, layers=0, heads=1, vocab_size=8))


@pytest.mark.parametrize("name", FILES)
def test_every_layout_reads_as_in_the_web_ui(name: str):
    expected = json.loads(sample("textual_inversion.json").read_text())["read_back_by_a1111"]
    theirs = expected[list(FILES).index(name)]
    embedding = read(sample(name))
    assert embedding.name == sample(name).stem
    assert len(embedding) == theirs["vectors"]
    assert sum(embedding.widths) == theirs["shape"]
    assert len(embedding.vectors) == (2 if theirs["kind"] == "dict" else 1)
    stored = read_tree(sample(name))
    for key in FILES[name]:
        stored = stored[key]
    halves = (stored,) if isinstance(stored, Tensor) else (stored["clip_l"], stored["clip_g"])
    for ours, half in zip(embedding.vectors, halves, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, half.reshape(ours.shape))


def test_old_and_half_precision_files_read_alike(tmp_path: Path):
    """A ParameterDict is how the first web UIs and the authors' own code stored the vectors."""
    vectors = torch.randn(2, 768)
    parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "a.pt"
    )
    torch.save({"string_to_param": OrderedDict({"*": vectors.half()}), "name": None}, tmp_path / "b.pt")
    torch.save({"*": vectors}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    torch.save({"<x>": nn.Parameter(vectors.T.contiguous().T)}, tmp_path / "d.bin")
    save_file({"text_encoders_1": vectors, "text_encoders_0": vectors + 1}, tmp_path / "e.safetensors")
    for name in ("a.pt", "c.pt", "d.bin"):
        assert torch.equal(read(tmp_path / name).vectors[0], vectors)
    assert torch.equal(read(tmp_path / "b.pt").vectors[0], vectors.half().float())
    assert torch.equal(read(tmp_path / "e.safetensors").vectors[0], vectors + 1)


def refused(tmp_path: Path, content: object) -> str:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "bad.pt")
    message = str(caught.value)
    assert message.startswith("bad.pt: ")
    assert len(message) <= 200
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": torch.ones(1, 768), "b": torch.ones(1, 768)}, "2 tensors.* checkpoint or a LoRA"),
        ({"string_to_param": {"*": torch.ones(1, 768), "x": torch.ones(1, 768)}}, "2 tensors"),
        ({"string_to_param": 5}, "damaged"),
        ({"string_to_param": {}}, "0 tensors"),
        ([torch.ones(1, 768)], "no named tensor"),
        ({"emb_params": torch.ones(1, 2, 768)}, r"shape \[1, 2, 768\]"),
        ({"emb_params": torch.tensor(1.0)}, r"shape \[\]"),
        ({"emb_params": torch.ones(0, 768)}, r"shape \[0, 768\]"),
        ({"emb_params": torch.ones([1] * 60)}, "shape"),
        ({"emb_params": torch.ones(1, 768, dtype=torch.int64)}, "type int64"),
        ({"emb_params": torch.ones(1, 768, dtype=torch.complex64)}, "type complex64"),
        ({"emb_params": torch.ones(1, 20_000)}, r"shape \[1, 20000\]"),
        ({"emb_params": torch.ones(76, 8)}, "76 vectors, a text encoder reads 75"),
        ({"emb_params": torch.full((1, 768), torch.nan)}, "NaN or infinity"),
        ({"emb_params": torch.full((1, 768), torch.inf)}, "NaN or infinity"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(3, 1280)}, "2 and 3 vectors"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280), "t5": torch.ones(2, 8)}, "3 tensors"),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_line(tmp_path: Path, content: object, says: str):
    assert re.search(says, refused(tmp_path, content))


def test_a_hostile_file_cannot_run_code(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    assert "no weight file needs" in refused(tmp_path, {"string_to_param": {"*": Bomb()}})
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_refused_at_every_length(tmp_path: Path):
    data = sample("kohya_sd15_3vectors.safetensors").read_bytes()
    for length in (0, 1, 8, 60, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"^cut.safetensors: "):
            read(tmp_path / "cut.safetensors")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    with pytest.raises(CheckpointError):
        read(tmp_path / "long.safetensors")


def test_an_embedding_of_another_family_is_refused_by_its_width():
    sd2 = Embedding(Path("style.pt"), (torch.ones(2, 1024),))
    sd1 = Embedding(Path("style.pt"), (torch.ones(2, 768),))
    sdxl = Embedding(Path("style.pt"), (torch.ones(2, 768), torch.ones(2, 1280)))
    clip_l, clip_h, clip_g = encoder(768), encoder(1024), encoder(1280)
    cases = [
        (sd2, [clip_l], r"1024 \(Stable Diffusion 2\), the model reads 768 \(Stable Diffusion 1\)"),
        (sd1, [clip_l, clip_g], r"768 \(Stable Diffusion 1\), the model reads 768 \+ 1280 \(.* XL\)"),
        (sdxl, [clip_l], r"768 \+ 1280 \(Stable Diffusion XL\), the model reads 768 "),
        (sdxl, [clip_h], "the model reads 1024"),
        (sd1, [encoder(128)], r"the model reads 128;"),
        (sd1, [nn.Embedding(10, 768)], "reads no embeddings"),
    ]
    for embedding, encoders, says in cases:
        with pytest.raises(CheckpointError, match=says):
            embedding.fitted(encoders)
    assert sd1.fitted([clip_l]) == sd1.vectors
    assert sdxl.fitted([clip_l, clip_g]) == sdxl.vectors
    assert sdxl.fitted([clip_g]) == sdxl.vectors[1:]  # the refiner of SDXL


def test_a_folder_gives_what_fits_by_name_and_nothing_from_outside(tmp_path: Path):
    def write(name: str, vectors: int, width: int = 768) -> None:
        save_file({"emb_params": torch.ones(vectors, width)}, tmp_path / name)

    folder = tmp_path / "embeddings"
    (folder / "a").mkdir(parents=True)
    write("embeddings/style.safetensors", 1)
    write("embeddings/a/style.safetensors", 2)
    write("embeddings/a/Other One.safetensors", 3)
    write("embeddings/sd2.safetensors", 4, 1024)
    write("embeddings/long.safetensors", 76)
    write("embeddings/not named.safetensors", 1)
    write("secret.safetensors", 5)
    (folder / "damaged.pt").write_bytes(b"PK\3\4")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "inner.safetensors").symlink_to(folder / "a" / "Other One.safetensors")
    text = "In STYLE other\\  one, inner; sd2 long damaged link"
    found = load_folder(folder, [encoder(768)], text)
    counts = {name: len(embedding) for name, embedding in found.items()}
    assert counts == {"style": 1, "Other One": 3, "inner": 3}
    assert list(load_folder(folder, [encoder(1024)], text)) == ["sd2"]
    assert load_folder(folder, [encoder(768)], "a red apple") == {}
    assert load_folder(tmp_path / "nowhere", [encoder(768)], text) == {}


def test_inserted_vectors_act_as_new_words_of_the_table():
    """As diffusers does it: the table of transformers' model grows, and new ids name its new rows."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    size, end, start = 60, 59, 58
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=48,
        intermediate_size=192,
        projection_dim=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act="gelu",
        bos_token_id=start,
        eos_token_id=end,
        max_position_embeddings=77,
    )
    peer = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    for parameter in peer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = ClipTextModel(
        ClipTextConfig(width=48, layers=3, heads=3, vocab_size=size, projection_dim=20)
    ).requires_grad_(False)
    model.load_state_dict(peer.state_dict())
    first, second = torch.randn(3, 48), torch.randn(1, 48)
    peer.resize_token_embeddings(size + 4, mean_resizing=False)
    peer.text_model.embeddings.token_embedding.weight[size:] = torch.cat([first, second])

    words = torch.randint(58, (3, 77))
    words[:, 0], words[0, 9:], words[1, 40:], words[2, 76:] = start, end, end, end
    theirs, ours = words.clone(), words.clone()
    inserted = []
    for row, place, vectors, ids in (
        (0, 4, first, [60, 61, 62]),
        (1, 1, second, [63]),
        (2, 73, first, [60, 61, 62]),
    ):
        theirs[row, place : place + len(ids)] = torch.tensor(ids)
        ours[row, place : place + len(ids)] = 0  # any token below END will do
        inserted.append(Inserted(row, place, vectors))

    expected = peer(theirs, output_hidden_states=True)
    hidden, pooled = model(ours, inserted=inserted, pooled=True)
    # Both sum in float32 in a different order.
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=0)
    states = model(ours, inserted=inserted, skip=2, final_norm=False).hidden
    torch.testing.assert_close(states, expected.hidden_states[-2], atol=1e-5, rtol=0)


def test_inserting_the_vector_of_a_word_gives_the_word():
    torch.manual_seed(0)
    model = ClipTextModel(ClipTextConfig(width=32, layers=2, heads=2, vocab_size=60)).requires_grad_(False)
    table = model.text_model.embeddings.token_embedding.weight
    before = table.clone()
    tokens = torch.randint(58, (2, 12))
    tokens[:, 0], tokens[:, 9:] = 58, 59
    blank = tokens.clone()
    blank[1, 3:6] = 0
    inserted = [Inserted(1, 3, table[tokens[1, 3:6]].double())]  # of another dtype, too
    assert torch.equal(model(blank, inserted=inserted).hidden, model(tokens).hidden)
    assert not torch.equal(model(blank).hidden, model(tokens).hidden)
    assert torch.equal(table, before)


def test_reading_leaves_the_file_as_it_is(tmp_path: Path):
    data = sample("kohya_sd15_3vectors.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data)
    read(tmp_path / "x.safetensors").vectors[0].zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == data
    assert load_file(tmp_path / "x.safetensors")["emb_params"].abs().sum() > 0

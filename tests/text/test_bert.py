"""The BERT-like encoder equals the original, and its tokens equal those of transformers."""

import random
import unicodedata
from pathlib import Path

import pytest
import torch

from ldm.errors import LdmError
from ldm.text.bert import BertConfig, BertTextModel, WordPiece, words
from tests.golden import module_case

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b ab ##ab abba the un ##aff ##able ' s , . ! $ "
    "½ é e ß 日 本 ##本 ᄒ ##ᅡ ##ᆫ σ ##α ##σ"
)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES.split()) + "\n", encoding="utf-8")
    return path


def test_equals_the_original():
    weights, values = module_case("bert_embedder_ldm_txt2img")
    model = BertTextModel(BertConfig(width=32, layers=2, vocab_size=200)).requires_grad_(False)
    model.load_state_dict(weights)
    # Outputs are of order 1 and the original's own float32 rounding is 1.3e-6.
    torch.testing.assert_close(model(values["in/tokens"]), values["out/out"], atol=2e-5, rtol=0)


TEXTS = [
    "",
    "Abba, the un-affable bab!",
    "ABBA'S $ab.  \t\nthe",
    "é É e\u0301 ß",
    "日本ab本",
    "한",
    "ΣΑΣ σ",
    "a\x0cb a\u200bb a\u00a0b \ufffd",
    "a" * 100,
    "a" * 101,
    "½ xyz ab½",
    "[unaffable]",
]


def test_equals_transformers(vocabulary: Path):
    from transformers import BertTokenizer

    peer = BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES.split())}, do_lower_case=True)
    tokenizer = WordPiece(vocabulary)
    generator = random.Random(0)
    noise = ["".join(generator.choices("abBA ,é日本'$", k=generator.randint(1, 120))) for _ in range(200)]
    for text in TEXTS + noise:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False), ascii(text)
        expected = peer.encode(text, truncation=True, max_length=77, padding="max_length")
        assert tokenizer.pad(ids) == expected


def test_words_equal_those_of_transformers_for_every_character():
    from transformers import BertTokenizer

    peer = BertTokenizer(vocab={"[UNK]": 0}, do_lower_case=True).backend_tokenizer
    # The Unicode tables of the peer lie between those of Python and 3.2: take what is alike in both.
    for char in map(chr, range(0x30000)):
        category = unicodedata.category(char)
        if category in ("Cn", "Cs", "Co") or category != unicodedata.ucd_3_2_0.category(char):
            continue
        if category != "Lo" or ord(char) % 97 == 0:  # other letters are alike: a few of each thousand will do
            text = peer.normalizer.normalize_str(f"a{char}B")
            expected = [word for word, _ in peer.pre_tokenizer.pre_tokenize_str(text)]
            assert words(f"a{char}B") == expected, ascii(char)


def test_a_wrong_vocabulary_is_explained(tmp_path: Path):
    path = tmp_path / "vocab.txt"
    with pytest.raises(LdmError, match=r"cannot read vocab\.txt"):
        WordPiece(path)
    path.write_text("a\nb\n")
    with pytest.raises(LdmError, match=r"no token \[PAD\]"):
        WordPiece(path)

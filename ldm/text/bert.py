"""The text encoder of latent diffusion's text2image-large: a BERT-like transformer and WordPiece tokens.

The transformer was trained with the diffusion model and shares only its vocabulary with BERT: attention is
not causal, and nothing marks the padding, so that every text attends to it, as in training. Parameter names
are those of the checkpoint below `cond_stage_model.`.

Rombach et al. 2022, arXiv:2112.10752, section 4.3.1; tokens: Devlin et al. 2019, arXiv:1810.04805.
"""

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import LdmError
from ldm.text_file import read_utf8

HEADS = 8
HEAD_WIDTH = 64  # whatever the width of the model: x-transformers' default
CONTEXT_LENGTH = 77


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape of the encoder; the defaults are those of text2image-large."""

    width: int = 1280
    layers: int = 32
    vocab_size: int = 30522
    context_length: int = CONTEXT_LENGTH


class PositionEmbedding(nn.Module):
    """A learned vector for each position. tokens (B, N) -> (N, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.emb.weight[: tokens.shape[1]]


class Attention(nn.Module):
    """Multi-head self-attention over all tokens. (B, N, D) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_k = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_v = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)  # (B, heads, N, 64)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers, four times as wide inside. (B, N, D) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The identity stands for a dropout: it keeps the numbers of the checkpoint.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AttentionLayers(nn.Module):
    """Attention and feed-forward in turn, each on a normed copy of the stream."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(config.width), block(config.width)])
            for _ in range(config.layers)
            for block in (Attention, FeedForward)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in self.layers:  # type: ignore[misc]  # each is a pair
            x = x + block(norm(x))
        return x


class Transformer(nn.Module):
    """Embeddings, layers and the last norm. tokens (B, N) int64 -> (B, N, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = PositionEmbedding(config)
        self.attn_layers = AttentionLayers(config)
        self.norm = nn.LayerNorm(config.width)
        # Never run; it is in the file, and a saved file shall have it too.
        self.to_logits = nn.Linear(config.width, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.attn_layers(self.token_emb(tokens) + self.pos_emb(tokens)))


class BertTextModel(nn.Module):
    """The whole encoder, under the name that its weights have in the checkpoint."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode texts: tokens (B, N) int64, N up to 77, to states (B, N, D) for cross-attention."""
        return self.transformer(tokens)


# Blocks in which every character is a word of its own.
_IDEOGRAPHS = (
    range(0x3400, 0x4DC0),
    range(0x4E00, 0xA000),
    range(0xF900, 0xFB00),
    range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2CEB0),
    range(0x2F800, 0x2FA20),
)


@lru_cache(maxsize=1 << 12)
def _normal_form(char: str) -> str:
    """A decomposed character as "uncased" BERT reads it: lower case, a space, nothing, or set apart."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category.startswith("Z"):
        return " "
    if category.startswith("C") or category == "Mn" or char == "\N{REPLACEMENT CHARACTER}":
        return ""
    ascii_sign = char.isascii() and not char.isalnum()
    if ascii_sign or category.startswith("P") or any(ord(char) in block for block in _IDEOGRAPHS):
        return f" {char} "
    return char.lower()


def words(text: str) -> list[str]:
    """Split into lower-case words without accents; signs and ideographs are words of their own."""
    return "".join(map(_normal_form, unicodedata.normalize("NFD", text))).split()


class WordPiece:
    """The tokenizer of bert-base-uncased, on a vocabulary file that the user supplies.

    Special tokens written out in a prompt ("[SEP]") are plain text.
    """

    def __init__(self, vocabulary: Path) -> None:
        """Read a `vocab.txt`, one token a line.

        Raises LdmError if there is no such file or a special token is not in it.
        """
        tokens = read_utf8(vocabulary).split("\n")
        self._ids = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
        for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if special not in self._ids:
                raise LdmError(
                    f"{vocabulary}: no token {special}; expected the vocab.txt of bert-base-uncased"
                )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text of any length, without [CLS] and [SEP]."""
        return [token for word in words(text) for token in self._word(word)]

    def pad(self, ids: list[int], length: int = CONTEXT_LENGTH) -> list[int]:
        """Wrap in [CLS] and [SEP] and fill up with [PAD] to exactly `length`; the rest is cut off."""
        row = [self._ids["[CLS]"], *ids[: length - 2], self._ids["[SEP]"]]
        return row + [self._ids["[PAD]"]] * (length - len(row))

    def _word(self, word: str) -> list[int]:
        """Take the longest known piece from the front, again and again; "##" marks all but the first."""
        unknown = [self._ids["[UNK]"]]
        if len(word) > 100:  # the original's limit, which also bounds the time
            return unknown
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return unknown
            ids.append(self._ids[prefix + word[start:end]])
            start = end
        return ids

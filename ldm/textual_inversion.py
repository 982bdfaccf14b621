"""Textual inversion: a few learned vectors that a text encoder reads in the place of a word.

Gal et al. 2022, arXiv:2208.01618. A file of some kilobytes holds n vectors of the width of the encoder's
token table, and a prompt names it by the file's name, as in AUTOMATIC1111's web UI. Nothing of the model
changes: `ldm.text.clip.Inserted` puts the vectors in the place of n tokens.

The layouts: the web UI's ("string_to_param"), diffusers' (the vectors under the word they were learned
for), kohya's ("emb_params"), and two tensors for the two encoders of SDXL ("clip_l" and "clip_g").
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.formats import read_tree
from ldm.formats.mapped import printable
from ldm.library import files
from ldm.text.clip import ClipTextModel

MAX_VECTORS = 75  # what one run of a text encoder reads beside START and END
MAX_WIDTH = 1 << 14

# Names of the two tensors of an SDXL file, CLIP-L's first: the common ones, and those of the first trainers.
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))

TITLES = {
    (768,): "Stable Diffusion 1",
    (1024,): "Stable Diffusion 2",
    (1280,): "Stable Diffusion XL refiner",
    (768, 1280): "Stable Diffusion XL",
}
"""Families by the widths of their text encoders, for messages."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Embedding:
    """What a file of textual inversion holds."""

    path: Path
    vectors: tuple[Tensor, ...]  # (n, D) float32 for each text encoder: one, or SDXL's CLIP-L and bigG

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def __len__(self) -> int:
        """How many tokens it takes the place of."""
        return len(self.vectors[0])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(v.shape[1] for v in self.vectors)

    def fitted(self, encoders: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """The vectors for each of a model's text encoders.

        The refiner of SDXL has only the second encoder, and takes the second half of SDXL's embeddings.
        Raises CheckpointError if the embedding was made for other encoders.
        """
        expected = tuple(e.config.width for e in encoders if isinstance(e, ClipTextModel))
        if self.widths == expected:
            return self.vectors
        if self.widths[1:] == expected != ():
            return self.vectors[1:]
        raise CheckpointError(
            f"the embedding '{printable(self.name)}' has width {_described(self.widths)}, "
            f"the model reads {_described(expected)}; use one made for this model"
        )


def read(path: str | os.PathLike[str]) -> Embedding:
    """Read an embedding of any layout. Raises CheckpointError, one line that names the file."""
    path = Path(path)
    tree = read_tree(path)
    try:
        return Embedding(path, _checked(_tensors(tree)))
    except CheckpointError as error:
        raise CheckpointError(printable(f"{printable(path.name)}: {error}", 200)) from None


def load_folder(folder: Path, encoders: Sequence[nn.Module], text: str) -> dict[str, Embedding]:
    """The embeddings of a folder, and of those below it, that `text` may name, by name.

    Only files whose names occur in it are read; capitals, white space and backslashes do not count, as the
    tokenizer and the prompt language drop them.

    A prompt may hold the name of an embedding that does not fit the model's text encoders, or of a damaged
    file: then it is a word like any other, as in the web UI, and the log tells. Of several files with one
    name the first counts, those of the folder itself before those below.
    """
    text = _squeezed(text)
    found: dict[str, Embedding] = {}
    for place, path in sorted(files(folder).items(), key=lambda item: (item[0].count("/"), item[0])):
        name = place.rpartition("/")[2]  # `path` may be what a link leads to
        if _squeezed(name) not in text:
            continue
        try:
            embedding = read(path)
            embedding.fitted(encoders)
        except CheckpointError as error:
            logger.info("left out: %s", error)
        else:
            found.setdefault(name, embedding)
    return found


def _squeezed(text: str) -> str:
    return "".join(text.lower().replace("\\", "").split())


def _tensors(tree: object) -> list[Tensor]:
    """The vectors of each encoder, as they are in the file."""
    if not isinstance(tree, Mapping):
        raise CheckpointError("it holds no named tensor; give a file of textual inversion")
    terms = tree.get("string_to_param", tree)
    if not isinstance(terms, Mapping):
        raise CheckpointError("its 'string_to_param' is damaged; download the file again")
    tensors = {name: value for name, value in terms.items() if isinstance(value, Tensor)}
    for pair in PAIRS:
        if tensors.keys() == set(pair):
            return [tensors[name] for name in pair]
    if len(tensors) != 1:
        raise CheckpointError(
            f"it holds {len(tensors)} tensors, an embedding has one, or clip_l and clip_g for SDXL; "
            "is it a checkpoint or a LoRA?"
        )
    return list(tensors.values())


def _checked(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each as (n, D) float32, if that is what they are."""
    tensors = [t.unsqueeze(0) if t.ndim == 1 else t for t in tensors]  # diffusers stores one vector flat
    for t in tensors:
        if t.ndim != 2 or not t.dtype.is_floating_point or 0 in t.shape or t.shape[1] > MAX_WIDTH:
            raise CheckpointError(
                f"it holds a tensor of shape {printable(str(list(t.shape)), 40)} and type "
                f"{str(t.dtype).removeprefix('torch.')}, an embedding has [vectors, width]; "
                "is it another kind of file?"
            )
        if len(t) > MAX_VECTORS:
            raise CheckpointError(
                f"it has {len(t)} vectors, a text encoder reads {MAX_VECTORS} at once; use one with fewer"
            )
    if len({len(t) for t in tensors}) > 1:
        counts = " and ".join(str(len(t)) for t in tensors)
        raise CheckpointError(f"it has {counts} vectors for the two encoders, which must be equally many")
    vectors = tuple(t.detach().float().contiguous() for t in tensors)
    if not all(torch.isfinite(v).all() for v in vectors):
        raise CheckpointError("its vectors hold NaN or infinity; the training failed, do not use it")
    return vectors


def _described(widths: tuple[int, ...]) -> str:
    numbers = " + ".join(map(str, widths)) or "no embeddings"
    return f"{numbers} ({TITLES[widths]})" if widths in TITLES else numbers

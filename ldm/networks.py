"""The files that a prompt calls beside the model: LoRA, hypernetworks, embeddings.

a red apple <lora:watercolour:0.8> in the style of my-embedding
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ldm import hypernetwork, lora
from ldm.files import sha256
from ldm.models import Models
from ldm.text.prompt import tags
from ldm.textual_inversion import Embedding, load_folder


@dataclass(frozen=True)
class Networks:
    """What takes part in one run."""

    loras: tuple[tuple[Path, float, float], ...] = ()  # file, multiplier for the UNet, for the text encoders
    hypernetworks: tuple[tuple[Path, float], ...] = ()  # file, multiplier
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)  # by the name in the prompt
    names: Mapping[Path, str] = field(default_factory=dict)  # what the tags of the prompt call these files

    @cached_property
    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """For the text in the picture, by the web UI's names of these fields."""
        found = {
            "Lora hashes": {self.names[path]: lora.short_hash(path) for path, *_ in self.loras},
            "TI hashes": {name: sha256(e.path)[:12] for name, e in self.embeddings.items()},
            "Hypernet hashes": {self.names[path]: sha256(path)[:10] for path, _ in self.hypernetworks},
        }
        return MappingProxyType({kind: names for kind, names in found.items() if names})


def find(models: Models, prompt: str, negative_prompt: str) -> tuple[str, Networks]:
    """The prompt without its tags, and the files that it and the negative prompt name.

    Only the tags of the prompt itself count; in the negative prompt they are text, as in the web UI.
    Raises PromptError for a tag that makes no sense, LdmError for a name that `models.library` lacks.
    """
    library = models.library
    text, found = tags(prompt)
    loras, hypernetworks, names = [], [], {}
    for tag in found:
        text_multiplier, unet_multiplier = tag.multipliers()
        if tag.kind == "hypernet":
            path = library.hypernetwork(tag.name)
            hypernetworks.append((path, text_multiplier))
        else:
            path = library.lora(tag.name)
            loras.append((path, unet_multiplier, text_multiplier))
        names[path] = tag.name
    words = f"{text}\n{negative_prompt}"
    embeddings = load_folder(library.embeddings, models.text, words) if library.embeddings else {}
    return text, Networks(tuple(loras), tuple(hypernetworks), embeddings, names)


@contextmanager
def applied(models: Models, networks: Networks) -> Iterator[None]:
    """Within the block, the model is changed by the LoRA files and hypernetworks; then it is as before."""
    with lora.applied(models, networks.loras), hypernetwork.applied(models, networks.hypernetworks):
        yield

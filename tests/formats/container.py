"""One of the layouts of torch.save, read from bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.errors import CheckpointError
from ldm.formats.mapped import MappedFile


class Container:
    """Reads bytes as a file of one of the two layouts."""

    def __init__(self, folder: Path, module: Any) -> None:
        self.path, self.module = folder / "a", module

    def read(self, content: bytes) -> Any:
        self.path.write_bytes(content)
        with MappedFile(self.path) as file:
            return self.module.read_tree(file)

    def refusal(self, content: bytes) -> str:
        with pytest.raises(CheckpointError) as error:
            self.read(content)
        return str(error.value)

"""The pictures of a plot, each in a file of its own, so that a run that was stopped goes on where it was.

A file's name holds a fingerprint of all that decides the picture: the text of its settings, with the hashes
of the model and of every file that took part. What is there already is not drawn again.
"""

import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ldm.checkpoint import load_vae
from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.files import remove_unfinished
from ldm.images import MAX_PIXELS, opaque, read_picture, read_text, save, with_text
from ldm.inputs import Inputs
from ldm.interrupts import patient
from ldm.main_memory import bounded
from ldm.models import Models
from ldm.pipeline import described, picture, sample
from ldm.planning import Plan, plan
from ldm.request import Request
from ldm.sheets.titles import Title, notice, sheet, shrunk
from ldm.stepdown import out_of_memory

MAX_CELLS = 10_000  # of one layout


@dataclass(frozen=True)
class Cell:
    """A picture to draw, and what to draw it with. Raises RequestError for a batch of several."""

    request: Request
    checkpoint: Path | None = None  # None: the model that the run is given
    vae: Path | None = None  # None: the autoencoder of that model
    styles: tuple[str, ...] = ()  # names, for `ldm.styles.apply`

    def __post_init__(self) -> None:
        if self.request.batch_size != 1:
            raise RequestError(
                f"each picture of a sheet is drawn alone, not {self.request.batch_size} at once"
            )


@dataclass(frozen=True)
class Layout:
    """A plot: sheets side by side, each with the same rows and columns."""

    cells: tuple[Cell | LdmError, ...]  # sheet by sheet and row by row; an error: why there is no such cell
    order: tuple[int, ...]  # of drawing
    tops: tuple[Title, ...]  # of the columns
    lefts: tuple[Title, ...] = ((),)  # of the rows
    titles: tuple[Title, ...] = ((),)  # of the sheets


Outcome = Path | LdmError
"""The file of a cell, or why there is none."""


def draw(
    layout: Layout, load: Callable[[Path | None], tuple[Models, Inputs]], folder: Path
) -> list[Outcome] | None:
    """Draw each cell of a layout into a file of `folder`, under a progress bar; the paths go to stdout.

    load: gives the model for a checkpoint, for None the usual one, and the pictures that each of its runs is
        given. It is called once for neighbours in the order of drawing, when the model before is gone.
    Returns None after Ctrl-C, which ends the run after the step at hand; the same call goes on from there.
    Raises OSError as files do.
    """
    remove_unfinished(folder)
    there = {path.stem.rpartition("-")[2]: path for path in folder.glob("*-*.png")}
    cells = {i: layout.cells[i] for i in layout.order}
    with patient() as asked, tqdm(total=0, unit="step", dynamic_ncols=True) as bar:
        run = _Run(folder, bar, asked, there)
        for i, cell in cells.items():
            if isinstance(cell, LdmError):
                run.fail([i], cell)
        todo = {i: cell for i, cell in cells.items() if isinstance(cell, Cell)}
        try:
            for checkpoint, group in itertools.groupby(todo, key=lambda i: todo[i].checkpoint):
                run.with_checkpoint(lambda c=checkpoint: load(c), {i: todo[i] for i in group})
        except KeyboardInterrupt:
            bar.close()
            done = sum(isinstance(outcome, Path) for outcome in run.outcomes.values())
            print(
                f"stopped; {done} of {len(cells)} pictures are done; the same command goes on from there",
                file=sys.stderr,
            )
            return None
    return [run.outcomes[i] for i in range(len(cells))]


def fingerprint(models: Models, run: Plan) -> str:
    """16 hexadecimal digits that stand for the settings of a picture and the files that make it."""
    text = described(models, run)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


@dataclass
class _Run:
    """What is known while cells are drawn."""

    folder: Path
    bar: tqdm
    asked: Callable[[], bool]  # to stop
    there: dict[str, Path]  # by fingerprints
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def fail(self, places: Collection[int], error: LdmError) -> None:
        copy = LdmError(str(error))  # the traceback of the original would keep the model alive
        self.outcomes |= dict.fromkeys(places, copy)
        listed = ", ".join(str(i + 1) for i in itertools.islice(places, 8)) + ", ..." * (len(places) > 8)
        self.bar.write(f"picture {listed}: {error}", file=sys.stderr)

    def with_checkpoint(self, load: Callable[[], tuple[Models, Inputs]], cells: Mapping[int, Cell]) -> None:
        """Draw the cells of one checkpoint."""
        try:
            own, inputs = load()
        except LdmError as error:
            self.fail(cells, error)
            return
        self.bar.write(f"{own.name}: {own.describe()}", file=sys.stderr)
        for vae, group in itertools.groupby(cells, key=lambda i: cells[i].vae):
            same = {i: cells[i] for i in group}
            try:
                models = own if vae is None else with_vae(own, vae)
            except LdmError as error:
                self.fail(same, error)
            else:
                self.with_models(models, inputs, same)

    def with_models(self, models: Models, inputs: Inputs, cells: Mapping[int, Cell]) -> None:
        """Draw cells that differ in their requests only."""
        runs: dict[int, tuple[str, Plan]] = {}
        for i, cell in cells.items():
            try:
                settled = plan(models, cell.request, inputs)
                runs[i] = fingerprint(models, settled), settled
            except LdmError as error:
                self.fail([i], error)
        new = {name: settled.steps_made for name, settled in runs.values() if name not in self.there}
        self.bar.total += sum(new.values())
        self.bar.refresh()
        for i, (name, settled) in runs.items():
            if name not in self.there:
                end = self.bar.n + settled.steps_made
                try:
                    self.there[name] = self.one(models, settled, self.folder / f"{i:05d}-{name}.png")
                except LdmError as error:
                    self.fail([i], error)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self.fail([i], LdmError("out of memory; try a smaller picture"))
                self.bar.update(end - self.bar.n)  # some samplers choose their number of steps themselves
            if name in self.there:
                self.outcomes[i] = self.there[name]

    def one(self, models: Models, run: Plan, path: Path) -> Path:
        """Draw one picture and save it. Raises KeyboardInterrupt between two steps."""
        latents = None
        with bounded(models.device):
            for step in sample(models, run.request, run.inputs):
                latents = step.x
                self.bar.update()
                if self.asked():
                    raise KeyboardInterrupt
            assert latents is not None
            image = picture(models, run, 0, latents[0])
        try:
            save(image, path)
        except LdmError:
            if not path.exists():  # another process was as quick
                raise
        self.bar.write(str(path))
        sys.stdout.flush()
        if self.asked():
            raise KeyboardInterrupt
        return path


def assembled(
    layout: Layout, outcomes: Sequence[Outcome], *, margin: int = 0, side: int | None = None
) -> Image.Image:
    """The pictures of a layout on one sheet, with the reasons where there are none, and the first one's text.

    margin: pixels between pictures.
    side: pixels that no picture on the sheet is longer than. Many large ones become smaller, so that the
        sheet stays below `images.MAX_PIXELS`.
    """
    columns, rows = len(layout.tops), len(layout.lefts)
    # Titles are at most as wide as one more column, and as high as two more rows in each of two places.
    room = max(math.isqrt(MAX_PIXELS // ((columns + 1) * len(layout.titles) * (rows + 4))) - margin, 1)
    side = min(side or room, room)
    pictures = {
        i: shrunk(opaque(read_picture(path)), side)
        for i, path in enumerate(outcomes)
        if isinstance(path, Path)
    }
    width = max((p.width for p in pictures.values()), default=min(side, 256))
    height = max((p.height for p in pictures.values()), default=min(side, 256))
    pictures |= {i: notice(str(o), width, height) for i, o in enumerate(outcomes) if isinstance(o, LdmError)}

    sheets = [
        sheet(
            [pictures[start + i] for i in range(columns * rows)],
            columns,
            tops=layout.tops,
            lefts=layout.lefts,
            margin=margin,
        )
        for start in range(0, len(outcomes), columns * rows)
    ]
    whole = sheet(sheets, len(sheets), tops=layout.titles, margin=margin)
    first = next((outcome for outcome in outcomes if isinstance(outcome, Path)), None)
    return whole if first is None else with_text(whole, read_text(first))


def with_vae(models: Models, path: Path) -> Models:
    """A model with the autoencoder of another file. Raises CheckpointError if it is none, or does not fit."""
    vae = load_vae(path, scale=models.family.scale, device=models.device)
    if vae.config.embed_dim != models.unet.config.out_channels:
        raise CheckpointError(
            f"{path.name}: an autoencoder of {vae.config.embed_dim} channels, "
            f"the UNet works on {models.unet.config.out_channels}"
        )
    return replace(models, vae=vae, vae_path=path)

"""What the command lines in scripts/ share: where pictures go, how a run is watched and how it ends."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import torch
from PIL.Image import Image
from tqdm import tqdm

from ldm.errors import LdmError, RequestError
from ldm.files import remove_unfinished
from ldm.images import ENDINGS, save, save_numbered
from ldm.inputs import Inputs
from ldm.interrupts import patient
from ldm.models import Models
from ldm.pipeline import picture, sample
from ldm.planning import plan
from ldm.request import Request


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1  # something failed, perhaps only some of the pictures
    USAGE = 2  # a value, a file or a request that cannot work
    DISK = 3  # reading or writing failed: a full disk, a missing permission
    STOPPED = 130  # by Ctrl-C or a polite kill


@dataclass(frozen=True)
class Output:
    """Where pictures go: a folder, in which they are numbered, or the file of a single one."""

    path: Path
    overwrite: bool = False  # whether a file may be replaced; in a folder, nothing ever is

    def prepare(self, pictures: int) -> None:
        """Make the folder. Raises RequestError if that many pictures cannot be saved."""
        if self.path.suffix.lower() in (".gif", ".bmp", ".tif", ".tiff", ".avif"):
            raise RequestError(f"pictures are saved as {', '.join(ENDINGS)}, not as {self.path.suffix}")
        if self._is_file and pictures > 1:
            raise RequestError(f"{self.path} is one file for {pictures} pictures; give a folder")
        if self._is_file and self.path.exists() and not self.overwrite:
            raise RequestError(f"{self.path} exists already; choose another name or add --overwrite")
        folder = self.path.parent if self._is_file else self.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot make the folder {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RequestError(f"the folder {folder} is not writable")
        remove_unfinished(folder)

    def save(self, image: Image, name: str) -> None:
        """Save a picture and print its path. name: what follows the number in a folder."""
        path = self.path
        if self._is_file:
            save(image, path, overwrite=self.overwrite)
        else:
            path = save_numbered(image, path, name)
        tqdm.write(str(path))  # on stdout, without tearing the progress bar
        sys.stdout.flush()

    @property
    def _is_file(self) -> bool:
        return self.path.suffix.lower() in ENDINGS


@dataclass(frozen=True)
class Job:
    """Pictures to draw at once."""

    request: Request
    inputs: Callable[[], Inputs] = Inputs  # reads the given pictures when their turn comes
    name: str = ""  # for people: of the given picture, say

    def __str__(self) -> str:
        return self.name or repr(self.request.prompt[:40])


def draw(models: Models, jobs: Sequence[Job], save: Callable[[Image, Job], None]) -> Exit:
    """Draw, under a progress bar.

    save: gets each picture as soon as it is finished, with the job that makes it alone.
    Of several jobs, one that fails is reported and the others go on. Ctrl-C ends the run after the step or
    the picture at hand. Raises LdmError if a single job does not fit the model, OSError as `save` does.
    """
    if len(jobs) > 1 and not jobs[0].name:  # what is wrong with all of them is told once
        plan(models, replace(jobs[0].request, prompt="", negative_prompt=""), jobs[0].inputs())
    print(f"{models.name}: {models.describe()}", file=sys.stderr)
    total, done, failed = sum(job.request.batch_size for job in jobs), 0, False
    seed = jobs[0].request.seed  # of the next picture
    with patient() as asked, tqdm(total=0, unit="step", dynamic_ncols=True, delay=0.01) as bar:
        for i, job in enumerate(jobs):
            seed = job.request.seed
            try:
                latents = None
                inputs = job.inputs()
                run = plan(models, job.request, inputs)  # each prompt may name other files
                begin = bar.n
                bar.total = begin + run.steps_made * (len(jobs) - i)  # the others will be like this one
                if i == 0 and run.strength is not None:
                    made = len(run.sigmas) - 1
                    bar.write(f"strength {run.strength:g} makes {made} of {run.steps} steps", file=sys.stderr)
                for step in sample(models, job.request, inputs):
                    latents = step.x
                    bar.update()
                    if asked():
                        raise KeyboardInterrupt
                assert latents is not None
                bar.update(begin + run.steps_made - bar.n)  # some samplers choose their number of steps
                for place, latent in enumerate(latents):
                    one = replace(job, request=job.request.single(place))
                    save(picture(models, run, place, latent), one)
                    done += 1
                    seed = one.request.seed + 1
                    if asked():
                        raise KeyboardInterrupt
            except LdmError as error:
                if len(jobs) == 1:
                    raise
                failed = True
                bar.write(f"{job}: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                bar.close()
                print(
                    f"stopped; {done} of {total} pictures are done, the next has seed {seed}", file=sys.stderr
                )
                return Exit.STOPPED
    if failed:
        print(f"{done} of {total} pictures are done", file=sys.stderr)
        return Exit.FAILED if done else Exit.USAGE
    return Exit.DONE


def device(name: str) -> torch.device:
    """The device of this name; "auto" is the best one here. Raises RequestError if it does not exist."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:1 or mps") from None
    mps = int(torch.backends.mps.is_available())
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}.get(chosen.type, 0)
    if (chosen.index or 0) >= count:
        raise RequestError(f"torch can use no device {name!r} here; --device cpu always works")
    return chosen


def report(program: str, error: Exception) -> Exit:
    """Say in one line on stderr what ended a program; return the exit code for it."""
    match error:
        case LdmError():
            text, code = str(error), Exit.USAGE
        case OSError():
            text, code = str(error), Exit.DISK
        case _ if _out_of_memory(error):
            text, code = (
                "out of memory; try a smaller picture, --batch-size 1 or --dtype float16",
                Exit.FAILED,
            )
        case _:
            first = str(error).strip().partition("\n")[0]
            text, code = f"{type(error).__name__}: {first} (--debug shows where)", Exit.FAILED
    print(f"{program}: {text}", file=sys.stderr)
    return code


def _out_of_memory(error: Exception) -> bool:
    # On the CPU, torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)

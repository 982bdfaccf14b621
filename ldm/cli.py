"""What the command lines in scripts/ share: where pictures go, how a run is watched and how it ends."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import torch
from PIL.Image import Image
from torch import nn
from tqdm import tqdm

from ldm import journal, networks
from ldm.errors import LdmError, RequestError
from ldm.files import remove_unfinished, sha256
from ldm.images import ENDINGS, numbered, save, save_numbered
from ldm.inputs import Inputs
from ldm.interrupts import patient
from ldm.main_memory import bounded
from ldm.models import Models
from ldm.optimization import FastConv2d
from ldm.pipeline import picture, sample
from ldm.planning import plan
from ldm.request import Request
from ldm.stepdown import out_of_memory
from ldm.storage import held_in
from ldm.text.prompt import without_comments
from ldm.upscalers import WEB_UI


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
    first: int | None = None  # of a run that goes on after its end, see `going_on`: the number of its start

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
        except FileExistsError:
            raise RequestError(
                f"{folder} is no folder but a file; give a folder, or the name of a picture: x.png"
            ) from None
        except OSError as error:
            raise RequestError(f"cannot make the folder {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RequestError(f"the folder {folder} is not writable")
        remove_unfinished(folder)

    @contextmanager
    def going_on(self, facts: Mapping[str, str]) -> Iterator["Output"]:
        """The same folder for a run that may have begun there before: its pictures have fixed numbers.

        Raises RequestError as `journal.going_on` does, and for a single file.
        """
        if self._is_file:
            raise RequestError("a run that goes on needs a folder; give one with --out")
        with journal.going_on(self.path, facts) as first:
            yield replace(self, first=first)

    def has(self, name: str, place: int) -> bool:
        """Whether a picture was saved before the run went on. Arguments as of `save`."""
        return self.first is not None and numbered(self.path, self.first + place, name).exists()

    def save(self, image: Image, name: str, place: int = 0) -> None:
        """Save a picture and print its path.

        name: what follows the number in a folder. place: of the picture in its run.
        """
        path = self.path
        if self.first is not None:
            path = numbered(path, self.first + place, name)
            save(image, path)
        elif self._is_file:
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
    place: int = 0  # of the job's first picture among those of the run; `draw` counts

    def __str__(self) -> str:
        return self.name or repr(self.request.prompt[:40])


def draw(
    models: Models,
    jobs: Sequence[Job],
    save: Callable[[Image, Job], None],
    *,
    has: Callable[[Job], bool] | None = None,
) -> Exit:
    """Draw, under a progress bar.

    save: gets each picture as soon as it is finished, with the job that makes it alone.
    has: tells of such a job whether its picture is there already; a batch whose pictures all are is passed
        over. None: no run came before.
    Of several jobs, one that fails is reported and the others go on. Ctrl-C ends the run after the step or
    the picture at hand. Raises LdmError if a single job does not fit the model, OSError as `save` does.
    """
    if len(jobs) > 1 and not jobs[0].name:  # what is wrong with all of them is told once
        plan(models, replace(jobs[0].request, prompt="", negative_prompt=""), jobs[0].inputs())
    print(f"{models.name}: {models.describe()}", file=sys.stderr)
    todo = _missing(jobs, has or (lambda job: False))
    total = sum(job.request.batch_size for job in jobs)
    done, failed = total - sum(len(missing) for _, missing in todo), False
    if done:
        print(f"{done} of {total} pictures are there already", file=sys.stderr)
    finished = 0  # of the jobs

    def reached() -> str:
        how = how_to_go_on(jobs, finished) if has is None else "the same command goes on from there"
        return f"{done} of {total} pictures are done; {how}"

    with patient() as asked, tqdm(total=0, unit="step", dynamic_ncols=True, delay=0.01) as bar:
        for i, (job, missing) in enumerate(todo):
            finished = i
            try:
                latents = None
                inputs = job.inputs()
                run = plan(models, job.request, inputs)  # each prompt may name other files
                begin = bar.n
                bar.total = begin + run.steps_made * (len(todo) - i)  # the others will be like this one
                if i == 0 and run.strength is not None:
                    made = len(run.sigmas) - 1
                    print(f"strength {run.strength:g} makes {made} of {run.steps} steps", file=sys.stderr)
                with bounded(models.device):
                    for step in sample(models, job.request, inputs):
                        latents = step.x
                        bar.update()
                        if asked():
                            raise KeyboardInterrupt
                    assert latents is not None
                    bar.update(begin + run.steps_made - bar.n)  # some samplers choose their number of steps
                    for one in missing:
                        place = one.place - job.place
                        save(picture(models, run, place, latents[place]), one)
                        done += 1
                        finished += one is missing[-1]
                        if asked():
                            raise KeyboardInterrupt
            except (LdmError, RuntimeError, MemoryError) as error:  # the last two: out of memory
                if len(jobs) == 1:
                    raise
                failed = True
                bar.write(f"{job}: {told(error)}", file=sys.stderr)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror or error}; {reached()}") from error
            except KeyboardInterrupt:
                bar.close()
                print(f"stopped; {reached()}", file=sys.stderr)
                return Exit.STOPPED
    if failed:
        print(f"{done} of {total} pictures are done", file=sys.stderr)
        return Exit.FAILED if done else Exit.USAGE
    return Exit.DONE


def how_to_go_on(jobs: Sequence[Job], finished: int) -> str:
    """For people, after so many jobs of a run without --resume."""
    if finished == len(jobs):
        return "these are all"
    if len(jobs) == 1:
        return "the same command begins again"
    job, count = jobs[finished], len(jobs) - finished
    seed = job.request.counted
    same = replace(job.request, **{seed: 0})
    if all(replace(one.request, **{seed: 0}) == same and not one.name for one in jobs):
        flag = seed.replace("_", "-")
        return f"for the others add --{flag} {getattr(job.request, seed)} --n-iter {count}"
    return f"the next is {job} with seed {job.request.seed}; a run with --resume goes on by itself"


def facts(models: Models, jobs: Sequence[Job], inputs: Inputs) -> dict[str, str]:
    """What decides the pictures of a run, for `Output.going_on`. inputs: what all jobs share.

    Raises LdmError if a prompt that all jobs share names a file that does not exist, OSError if one fails.
    """
    made_of = [
        (
            *(one.hash, one.vae_hash, one.ema, one.device.type),
            *(one.denoiser.prediction, one.denoiser.dtype, held_in(one.denoiser.network)),
        )
        for one in (models, models.refiner)
        if one is not None
    ]
    return {
        "number of pictures": str(sum(job.request.batch_size for job in jobs)),
        "prompt or setting": journal.digest([(job.request, job.name) for job in jobs]),
        "model or device": journal.digest(made_of),
        "LoRA, embedding or other file": journal.digest(_files(models, [job.request for job in jobs])),
        "--fast or --budget": journal.digest((_is_fast(models.unet), models.limits)),
        # More threads add up in another order.
        "number of threads": str(torch.get_num_threads() if models.device.type == "cpu" else 1),
        "hint": journal.digest(list(inputs.fields())),
    }


def _files(models: Models, requests: Iterable[Request]) -> list[tuple[str, str]]:
    """The files that requests name, with their hashes. Several prompts: those that cannot work add none."""
    texts: set[tuple[str, str]] = set()
    upscalers: set[str] = set()
    for one in requests:
        texts.add((one.prompt, one.negative_prompt))
        if two := one.hires:
            texts.add((two.prompt or one.prompt, two.negative_prompt or one.negative_prompt))
            upscalers.add(two.upscaler)
    paths: set[tuple[str, Path]] = set()
    for text in texts:
        with suppress(LdmError) if len(texts) > 1 else nullcontext():
            found = networks.find(models, *map(without_comments, text))[1]
            paths |= {(name, path) for path, name in found.names.items()}
            paths |= {(name, embedding.path) for name, embedding in found.embeddings.items()}
    for name in upscalers:
        with suppress(LdmError):  # most are none of the library's
            paths.add((name, models.library.upscaler(WEB_UI.get(name, name))))
    return sorted((name, sha256(path)) for name, path in paths)


def _is_fast(network: nn.Module) -> bool:
    """Whether it was changed by ldm.optimize, or compiled."""
    return network._compiled_call_impl is not None or any(type(m) is FastConv2d for m in network.modules())


def _missing(jobs: Sequence[Job], has: Callable[[Job], bool]) -> list[tuple[Job, list[Job]]]:
    """The jobs that are not yet done, each with the jobs for its single pictures that are not there."""
    todo, place = [], 0
    for job in jobs:
        job = replace(job, place=place)
        singles = [
            replace(job, request=job.request.single(i), place=place + i)
            for i in range(job.request.batch_size)
        ]
        place += len(singles)
        if missing := [one for one in singles if not has(one)]:
            todo.append((job, missing))
    return todo


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
            code = Exit.USAGE
        case OSError():
            code = Exit.DISK
        case _:
            code = Exit.FAILED
    print(f"{program}: {told(error)}", file=sys.stderr)
    return code


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, LdmError | OSError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; try a smaller picture, --batch-size 1 or --dtype float16"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"

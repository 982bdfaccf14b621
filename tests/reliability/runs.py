"""Command lines in processes of their own, to be killed: cheap, as each is a fork of one that has torch."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

from ldm.files import UNFINISHED

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["ldm.cli", "ldm.reproduce", "scripts.txt2img", "tests.reliability.runs", "torch._dynamo"]
)

SMALL = ["--width", "16", "--height", "16", "--steps", "2", "--device", "cpu"]


def start(script: str, argv: list[str], log: Path) -> BaseProcess:
    """Run scripts/`script`.py; what it says goes to the end of `log`, which exists once the run has begun."""
    process = _CONTEXT.Process(target=_run, args=(script, argv, str(log)), daemon=True)
    process.start()
    return process


def _run(script: str, argv: list[str], log: str) -> None:
    import flags
    import torch

    torch.set_num_threads(1)
    main = importlib.import_module(f"scripts.{script}").main

    def logged() -> int:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        return main(argv)

    flags.start(logged)


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder and their fingerprints, without what a killed process left unfinished."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if UNFINISHED not in path.name
    }

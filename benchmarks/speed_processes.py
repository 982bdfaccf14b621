"""Measuring whole processes: import, load, a picture; the time and memory of each from the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import FOLDER, PEERS, present, python
from benchmarks.speed_networks import Setting, our_unet, our_vae, randomised, their_unet, their_vae

ROOT = Path(__file__).parent.parent
CACHE = str(Path(tempfile.gettempdir()) / "ldm-benchmark-bytecode")


def process(command: Sequence[str]) -> dict[str, float]:
    """What a command took: seconds, and its largest memory in MB; and what it says itself, see CLOCK."""
    # Bytecode is kept as in any installation, but not in this checkout; nor is a package of this folder, ldm
    # above all, in the way of a peer's.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    env["PYTHONPYCACHEPREFIX"] = CACHE
    folder = ROOT if command[0] == sys.executable else FOLDER
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        said.seek(0)
        own = [line.split()[1:] for line in said if line.startswith(MARK)]
    if status != 0:
        raise RuntimeError(f"failed: {' '.join(command)}")
    rss = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": time.perf_counter() - start,
        "MB": rss,
        **({"load cpu": float(own[-1][0]), "load wall": float(own[-1][1])} if own else {}),
    }


MARK = "benchmark:"

CLOCK = """
import time
cpu, wall = time.process_time(), time.perf_counter()
{}
print("\\n" + "{}", time.process_time() - cpu, time.perf_counter() - wall)
"""
"""Around a part of a program: it tells its seconds."""


def clocked(imports: str, work: str) -> str:
    """A program that tells the time of its work without that of its imports."""
    return imports + CLOCK.format(work, MARK)


def processes(rounds: int, rivals: Mapping[str, Sequence[str]], *, memory: int = 0) -> dict[str, Any]:
    """The least of some rounds, after one in which files come into the memory of the machine.

    memory: bytes that are touched and freed before each process. A virtual machine gives away what is free,
        and the first to take it again waits for it: without this, the order of the rivals decides.
    """
    for command in rivals.values():
        process(command)
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, command in rivals.items():
            process((sys.executable, "-c", f"b'1' * {memory}"))
            now = process(command)
            found[name] = {key: min(value, found.get(name, now)[key]) for key, value in now.items()}
    return dict(found)


def imports(setting: Setting) -> dict[str, Any]:
    programs = {"torch": "import torch", "plain": "import ldm", "diffusers": THEIR_IMPORT}
    commands = {name: (sys.executable, "-c", code) for name, code in programs.items()}
    commands |= {name: (python(name), "-c", PEERS[name].imports) for name in present()}
    return processes(setting.rounds, commands)


THEIR_IMPORT = """
import sys
sys.modules["torchvision"] = None
from diffusers import StableDiffusionPipeline
"""

OUR_LOADERS = "import sys, ldm"

OUR_LOAD = "ldm.load(sys.argv[1])"

THEIR_LOADERS = """
import sys, torch
sys.modules["torchvision"] = None
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel
"""

THEIR_LOAD = """
without = dict.fromkeys(("tokenizer", "feature_extractor", "safety_checker"))
StableDiffusionPipeline.from_single_file(
    f"{sys.argv[1]}/model.safetensors", config=sys.argv[1], torch_dtype=torch.float32, local_files_only=True,
    scheduler=DDIMScheduler(), requires_safety_checker=False, **without,
)
"""

THEIR_LOAD_OF_FOLDERS = """
for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
    globals()[name] = kind.from_pretrained(f"{sys.argv[1]}/{name}", torch_dtype=torch.float32)
text = CLIPTextModel.from_pretrained(f"{sys.argv[1]}/text_encoder", dtype=torch.float32)
"""


def load(setting: Setting) -> dict[str, Any]:
    """A file of half precision into float32; diffusers also from its own layout, a folder for each network.

    Imports and the end of a process count, but not in `load cpu` and `load wall`.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.speed", "--write", folder], cwd=ROOT, check=True)
        ours, file = (sys.executable, "-c"), f"{folder}/model.safetensors"
        commands = {
            "plain": (*ours, clocked(OUR_LOADERS, OUR_LOAD), file),
            "diffusers": (*ours, clocked(THEIR_LOADERS, THEIR_LOAD), folder),
            "diffusers, folders": (*ours, clocked(THEIR_LOADERS, THEIR_LOAD_OF_FOLDERS), folder),
        }
        for name in (name for name in present() if PEERS[name].load):
            commands[name] = (python(name), "-c", clocked(PEERS[name].imports, PEERS[name].load), file)
        return processes(setting.rounds, commands, memory=7 * 10**9)


def write(folder: Path) -> None:
    """A random Stable Diffusion 1.5 in half precision: as one file, and as diffusers writes it."""
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    from ldm.denoise import Denoiser, Prediction
    from ldm.families import FAMILIES
    from ldm.models import Models
    from ldm.text.clip import CLIP_L, ClipTextModel

    logging.disable_progress_bar()
    setting = Setting(1, False)
    family = next(family for family in FAMILIES if family.name == "sd1")
    text = randomised(lambda: ClipTextModel(CLIP_L)).half()
    parts = our_unet(setting).half(), our_vae(setting).half()
    models = Models(family, Denoiser(parts[0], family.schedule(), Prediction.EPS), parts[1], (text,))
    models.save(folder / "model.safetensors")
    del models, parts
    for name, make in (("unet", their_unet), ("vae", their_vae)):
        make(setting).to_empty(device="cpu").half().save_pretrained(folder / name)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps(INDEX))


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
}
"""What diffusers wants to know of its parts."""


def picture(setting: Setting) -> dict[str, Any]:
    """From the command to the PNG, with the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        script = (sys.executable, "scripts/txt2img.py", "--overwrite", f"--out={folder}/x.png")
        return processes(setting.rounds, {"plain": (*script, "--prompt=a red apple", *QUICK * setting.quick)})


QUICK = ("--steps=2",)

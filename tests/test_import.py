"""`import ldm` is light: nothing heavy comes with it, and nothing goes over the network."""

import json
import subprocess
import sys

HEAVY = (
    "torchvision",
    "open_clip",
    "transformers",
    "diffusers",
    "scipy",
    "matplotlib",
    "torchsde",
    "pandas",
    "torch._dynamo",
)

PROGRAM = """
import json, sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") else None)
import torch
before = set(sys.modules)
import ldm
print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules), events]))
"""


def test_import_loads_nothing_heavy_and_opens_no_socket():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    new, loaded, events = json.loads(run.stdout)
    assert not [module for module in HEAVY if module in new]
    assert not [module for module in HEAVY[:6] if module in loaded]
    assert "ldm.pipeline" in new
    assert not [event for event in events if event in ("socket.connect", "socket.getaddrinfo")]


def test_training_is_not_part_of_the_import():
    program = "import sys, ldm; sys.exit(any(name.startswith('ldm.training') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_exists():
    import ldm

    assert [name for name in ldm.__all__ if not hasattr(ldm, name)] == []


def test_a_picture_is_drawn_without_the_compiler():
    """Torch's compiler takes a second to import, and some ways to build a network on meta call it in vain."""
    program = (
        "import sys, ldm\n"
        "ldm.txt2img(ldm.load(), ldm.Request(prompt='x', steps=1))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

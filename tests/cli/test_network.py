"""Nothing contacts the network unless a name of the hub was asked for, and no foreign code runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import remixdit
from tests.command_line import SIDE, write_folder, write_npz
from tests.tiny import save_tiny

# Put before every process by Python itself: notes what would leave this machine, and stops it.
GUARD = """
import json, os, sys

HERE = {"localhost", "127.0.0.1", "::1", None, ""}

def watch(event, args):
    if event == "socket.getaddrinfo":
        place = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        place = args[1][0]
    else:
        return
    place = place.decode() if isinstance(place, bytes) else place
    if place not in HERE:
        with open(os.environ["CONTACTS"], "a") as file:
            file.write(json.dumps([event, place, sys.argv]) + "\\n")
        raise OSError(f"no network for {place}")

sys.addaudithook(watch)
"""

COMMANDS = """
import shlex, sys
from remixdit.cli.main import main

for line in sys.argv[1:]:
    code = main(shlex.split(line))
    print("exit", code, flush=True)
"""


def contacts(root: Path, *lines: str) -> tuple[list[str], list[int]]:
    """Run commands, one after the other, in a process of their own.

    Returns:
        What they tried to contact, and their exit codes.
    """
    (root / "guard").mkdir()
    (root / "guard" / "sitecustomize.py").write_text(GUARD)
    noted = root / "contacts"
    path = [str(root / "guard"), str(Path(remixdit.__file__).parents[1])]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "CONTACTS": str(noted)}
    environment |= {"HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *lines],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    codes = [int(code) for code in re.findall(r"^exit (\d+)$", done.stdout, re.MULTILINE)]
    assert len(codes) == len(lines), done.stderr
    found = noted.read_text().splitlines() if noted.is_file() else []
    return [json.loads(line)[1] for line in found], codes


@pytest.mark.slow
def test_nothing_contacts_the_network_unless_a_name_of_the_hub_was_asked_for(tmp_path):
    root = tmp_path
    photos = write_folder(root / "photos", cat=6, dog=6)
    pictures = write_npz(root / "pictures.npz")
    save_tiny(root / "vae")
    shards, run, latents = (root / name for name in ("shards", "run", "latents"))
    tiny = "--steps 2 --batch-size 4 --log-every 1"
    lines = [
        f"encode {photos} --output {shards} --image-size {SIDE}",
        f"encode {photos} --output {latents} --image-size {SIDE} --autoencoder {root}/vae",
        f"data check {latents}",
        f"train tiny --data {shards} --output-dir {run} {tiny} --sample-every 2",
        f"train tiny --data {latents} --output-dir {root}/lat {tiny} --sample-every 2 "
        "--patch-size 2",
        f"sample {run} --output {root}/out.npz --num-images 4 --num-inference-steps 2",
        f"sample {root}/lat --output {root}/lat.npz --num-images 2 --num-inference-steps 2",
        f"info {run}",
        f"losses {run} --data {shards} --num-images 4",
        f"plot {run} --output {root}/figures",
        f"export {run} --output {root}/dit --format dit --expert 0",
        f"import {root}/dit/dit.safetensors --output {root}/model --num-heads 4",
        f"merge {run} --output {root}/merged",
        f"export {run} --output {root}/pipe --format pipeline",
        f"evaluate {root}/out.npz --reference {pictures}",
    ]
    found, codes = contacts(root, *lines)
    assert found == []
    assert codes == [0] * len(lines), list(zip(codes, lines, strict=True))


def test_the_guard_of_this_test_sees_the_hub_when_its_name_is_asked_for(tmp_path):
    found, codes = contacts(
        tmp_path,
        f"sample owner/name --output {tmp_path}/a.png",
        f"sample nothing/here.safetensors --output {tmp_path}/a.png",
    )
    assert set(found) == {"huggingface.co"}
    assert codes == [1, 2]


def test_code_of_the_hub_is_never_trusted_by_ours():
    source = Path(remixdit.__file__).parent
    trusted = [
        f"{path}:{node.lineno}"
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")
        or (isinstance(node, ast.Constant) and node.value == "trust_remote_code")
    ]
    assert trusted == []

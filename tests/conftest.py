"""Shared by all tests: one thread, quiet libraries, no network, and a small model that really was trained."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

# transformers keeps the stderr it was imported under; that of a finished command is closed.
transformers.utils.logging.disable_default_handler()
assert logging.lastResort is not None
logging.getLogger("transformers").addHandler(logging.lastResort)  # writes to whatever stderr is then

sys.path.insert(0, str(Path(__file__).parent))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On matrices this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(pytestconfig: pytest.Config) -> Path:
    """A Llama of 0.5 M parameters, trained on pydoc text; kept in pytest's cache between runs."""
    from trained_model import train

    return train(Path(pytestconfig.cache.mkdir("trained-model")))


@pytest.fixture(scope="session")
def compressed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model at 50% + 4 bit, through our own stage."""
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.recipe import CompressSection
    from ctp_cli.stages.compress import compress

    output = tmp_path_factory.mktemp("compressed") / "small-s50-w4"
    section = CompressSection(sparsity=0.5, bits=4, calibration="pydoc:train", windows=16, seqlen=128)
    compress(section, model=resolve_model(str(trained)), output=output)
    return output


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real text samples is not beside the project")
    return SHARED / "data"

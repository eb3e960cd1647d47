"""Every kernel against the oracle, in Triton's interpreter, and so without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreted_products import CASES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: there is none for this platform"
)
Found = dict[str, dict[str, float]]


SLOW = {f"{layout}-{number}" for layout in ("8:16", "bitmap") for number in (3, 5, 6)}
"""Cases that take seconds each."""


def interpret(names: set[str]) -> Found:
    program = Path(__file__).parent / "interpreted_products.py"
    done = subprocess.run(
        [sys.executable, str(program), *sorted(names)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: Found = json.loads(done.stdout)
    return results


@pytest.fixture(scope="module")
def found() -> Found:
    return interpret(CASES.keys() - SLOW)


@pytest.fixture(scope="module")
def found_slowly() -> Found:
    return interpret(SLOW)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SLOW])
def test_products_gradients_and_weights_are_the_oracles(name: str, found: Found) -> None:
    # a NaN compares as False, too
    assert all(error < CASES[name].tolerance for error in found[name].values()), found[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_the_rest_of_them(name: str, found_slowly: Found) -> None:
    assert all(error < CASES[name].tolerance for error in found_slowly[name].values()), found_slowly[name]


def test_no_rows_and_chosen_tiles(found: Found) -> None:
    assert found["unusual"]["rows"] == 0
    assert found["unusual"]["chosen"] < 1e-6


def test_scattered_groups(found: Found) -> None:
    assert all(error < 1e-3 for error in found["scattered"].values()), found["scattered"]


def test_the_solvers_loops() -> None:
    """test_sweep.py, whose tests of kernels are skipped without a GPU in a process that does not interpret them."""
    some = "as_triton and (130 or errors or (150 and best))"
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "test_sweep.py"), "-k", some]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]

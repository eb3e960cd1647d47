"""Format ctp: every code comes back, pruned weights take one bit, and what lies is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed import calibration_text, run, stored_tensors
from ctp_kernels import dispatch
from ctp_kernels.ragged import pack_bits, pack_kept, row_starts, unpack_bits, unpack_kept
from ctp_kernels.reference import PackedParts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_model

from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_kept_codes_are_one_bit_stream_a_row_and_can_be_undone(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    rows, width = data.draw(st.integers(1, 4)), 8 * data.draw(st.integers(1, 5))
    table = st.lists(
        st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width), min_size=rows, max_size=rows
    )
    codes = torch.tensor(data.draw(table), dtype=torch.uint8)
    choice = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    keep = torch.tensor(data.draw(choice), dtype=torch.bool)
    stream, starts = pack_kept(codes, keep, bits), row_starts(pack_bits(keep), bits).tolist()
    for row in range(rows):
        # one integer of any length
        expected = sum(code << bits * i for i, code in enumerate(codes[row][keep[row]].tolist()))
        assert int.from_bytes(bytes(stream[starts[row] : starts[row + 1]].tolist()), "little") == expected
    assert len(stream) == starts[-1]
    assert torch.equal(unpack_kept(stream, keep, bits), codes * keep)
    mask = pack_bits(keep)
    assert mask.shape == (rows, width // 8)
    assert [bool(int(mask[0, i // 8]) >> i % 8 & 1) for i in range(width)] == keep[0].tolist()
    assert torch.equal(unpack_bits(mask), keep)


def test_long_rows_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctp_kernels.ragged._ROWS", 100)
    codes = torch.arange(7 * 40).remainder(8).to(torch.uint8).view(7, 40)
    keep = codes % 3 != 0
    assert torch.equal(unpack_kept(pack_kept(codes, keep, 3), keep, 3), codes * keep)


def pruned_codes(
    bits: int, share: float, *, symmetric: bool = True, run: tuple[int, int] | None = None, scattered: bool = False
) -> Codes:
    """(24, 64) codes, groups of 32, of which `share` are zero points or, with `run`, n of every m."""
    generator = torch.Generator().manual_seed(int(100 * share) + bits)
    outputs, inputs, top = 24, 64, 2**bits
    zeros = torch.randint(0, top, (outputs, 2), generator=generator).to(torch.uint8)
    zeros = torch.full_like(zeros, top // 2) if symmetric else zeros
    g_idx = (torch.randperm(inputs, generator=generator) if scattered else torch.arange(inputs)).int() % 64 // 32
    codes = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    score = torch.rand(outputs, inputs, generator=generator)
    pruned = score < share
    if run is not None:
        n, m = run
        pruned = (score.view(outputs, -1, m).argsort(2).argsort(2) >= n).view(outputs, inputs)
    scales = (torch.rand(outputs, 2, generator=generator) + 0.5).half().float()
    return Codes(torch.where(pruned, zeros[:, g_idx.long()], codes), scales, zeros, g_idx)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_come_back_bit_for_bit_in_the_smallest_layout(
    bits: int, share: float, symmetric: bool, scattered: bool
) -> None:
    codes, form = (
        pruned_codes(bits, share, symmetric=symmetric, scattered=scattered),
        PackedSettings(bits, 32, symmetric),
    )
    parts = parts_of(form, codes)
    back = form.unpack("layer", parts)
    for name in ("codes_OI", "scales_OG", "zeros_OG", "g_idx_I"):
        assert torch.equal(getattr(back, name), getattr(codes, name)), name
    assert ("zeros" in parts) == (not symmetric)
    assert ("g_idx" in parts) == scattered
    dense_bytes = 24 * 64 * bits // 8
    stored = parts["codes"].numel() + (parts["mask"].numel() if "mask" in parts else 0)
    if share > 1.5 / bits:  # clearly below a density of (bits - 1) / bits
        assert "mask" in parts
        assert stored < dense_bytes
    if share == 0:
        assert "mask" not in parts
    assert stored <= dense_bytes


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "share", "run"), [(2, 0.8, None), (3, 0.5, (2, 4)), (4, 0.5, None), (8, 0.0, None)])
def test_the_reader_that_the_documentation_prints_reads_what_is_written(
    bits: int, share: float, run: tuple[int, int] | None, symmetric: bool, scattered: bool
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "format-ctp.md").read_text()
    names: dict[str, Any] = {"np": np}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    codes = pruned_codes(bits, share, symmetric=symmetric, run=run, scattered=scattered)
    parts = {name: t.numpy() for name, t in parts_of(PackedSettings(bits, 32, symmetric, run), codes).items()}
    np.testing.assert_array_equal(names["weights"](parts, bits, 32, symmetric), codes.values().numpy())


def test_groups_of_unequal_sizes_are_written_down() -> None:
    """Readers take groups that are not stored as equally long."""
    even, form = pruned_codes(4, 0.5), PackedSettings(4, 32, True)
    uneven = Codes(even.codes_OI[:, :40], even.scales_OG, even.zeros_OG, even.g_idx_I[:40])
    assert "g_idx" in parts_of(form, uneven)
    assert torch.equal(form.unpack("layer", parts_of(form, uneven)).values(), uneven.values())
    weight = dispatch.prepare(PackedParts(bits=4, **parts_of(form, uneven)))
    torch.testing.assert_close(weight.dense(torch.float32), uneven.values())
    without = {name: tensor for name, tensor in parts_of(form, uneven).items() if name != "g_idx"}
    with pytest.raises(InputError, match="do not go together"):
        form.unpack("layer", without)
    # one group that is not as long as it might be is of one size
    short = Codes(even.codes_OI[:, :16], even.scales_OG[:, :1], even.zeros_OG[:, :1], even.g_idx_I[:16])
    assert "g_idx" not in parts_of(form, short)
    assert torch.equal(form.unpack("layer", parts_of(form, short)).values(), short.values())


def parts_of(form: PackedSettings, codes: Codes) -> dict[str, torch.Tensor]:
    return {name.removeprefix("layer."): tensor for name, tensor in form.pack("layer", codes).items()}


@pytest.mark.parametrize("run", [(2, 4), (4, 8), (8, 16)])
def test_n_of_m_keeps_exactly_n_though_kept_weights_were_rounded_to_zero(run: tuple[int, int]) -> None:
    n, m = run
    codes, form = pruned_codes(4, 0, run=run), PackedSettings(4, 32, True, run)
    kept = (codes.codes_OI != 8).view(24, -1, m).sum(2)
    assert (kept < n).any(), "no kept code equals the zero point: the test shows nothing"
    parts = parts_of(form, codes)
    assert (unpack_bits(parts["mask"]).view(24, -1, m).sum(2) == n).all()
    assert parts["codes"].shape == (24, 64 * n // m // 2)
    assert torch.equal(form.unpack("layer", parts).codes_OI, codes.codes_OI)
    # a layer that is not as sparse as the settings say is stored all the same
    loose = pruned_codes(4, 0.3)
    assert torch.equal(form.unpack("layer", parts_of(form, loose)).codes_OI, loose.codes_OI)


def test_parts_that_do_not_go_together_are_refused() -> None:
    form, codes = PackedSettings(4, 32, False), pruned_codes(4, 0.5, symmetric=False)
    good = parts_of(form, codes)
    for change in (
        {"codes": good["codes"][:-1]},
        {"codes": torch.cat([good["codes"], good["codes"][:1]])},
        {"codes": good["codes"].int()},
        {"codes": good["codes"].view(1, 1, -1)},
        {"mask": good["mask"][:-1]},
        {"mask": good["mask"][:, :-1]},
        {"mask": good["mask"] ^ 1},
        {"mask": good["mask"].float()},
        {"scales": good["scales"][:, :1]},
        {"scales": good["scales"][0]},
        {"zeros": good["zeros"][:1]},
        {"zeros": good["zeros"].float()},
        {"zeros": good["zeros"] + 16},
        {"g_idx": torch.zeros(64, dtype=torch.complex64)},
        {"g_idx": torch.zeros(64, dtype=torch.uint64)},
        {"g_idx": torch.arange(64, dtype=torch.int32)},
        {"g_idx": torch.full((64,), -1, dtype=torch.int32)},
        {"g_idx": torch.zeros(64)},
        {
            "codes": good["codes"][:0],
            "mask": good["mask"][:0],
            "scales": good["scales"][:0],
            "zeros": good["zeros"][:0],
        },
        {"codes": good["codes"][:0].view(24, 0), "mask": good["mask"][:, :0]},
    ):
        with pytest.raises(InputError, match=r"layer: the .* parts of this layer do not go together"):
            form.unpack("layer", {**good, **change})
    for missing in ("codes", "scales"):
        with pytest.raises(InputError, match=f"layer: {missing} missing"):
            form.unpack("layer", {part: tensor for part, tensor in good.items() if part != missing})
    with pytest.raises(InputError, match="do not go together"):
        form.unpack("layer", {part: tensor for part, tensor in good.items() if part != "zeros"})
    with pytest.raises(InputError, match="do not go together"):  # a symmetric grid stores none
        PackedSettings(4, 32, True).unpack("layer", good)
    odd = {
        "codes": torch.zeros(24, 12, dtype=torch.uint8),
        "scales": good["scales"][:, :1],
        "zeros": good["zeros"][:, :1],
    }
    with pytest.raises(InputError, match="do not go together"):
        PackedSettings(8, 12, False).unpack("layer", odd)
    for other in (PackedSettings(3, 32, False), PackedSettings(4, 64, False), PackedSettings(4, 16, False)):
        with pytest.raises(InputError, match="do not go together"):
            other.unpack("layer", good)
    with pytest.raises(InputError, match="multiple of 8"):
        form.check_layer("layer", out_features=3, in_features=36)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"bits": 5},
        {"bits": None},
        {"bits": 4.0},
        {"group_size": "64"},
        {"group_size": 10**30},
        {"sparsity": "2of4"},
        {"sparsity": 3},
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    config = PackedSettings(4, 64, True, (2, 4)).to_config()
    assert PackedSettings.from_config(config, tmp_path) == PackedSettings(4, 64, True, (2, 4))
    with pytest.raises(InputError, match=str(tmp_path)):
        PackedSettings.from_config({**config, **change}, tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama_tied_gqa", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": "2:4", "bits": 3},
        {"sparsity": 0.75, "bits": 2, "symmetric": False},
        {"sparsity": None, "bits": 8, "act_order": "column"},
        {"tune_windows": 2, "group_size": "row"},
    ],
    ids=str,
)
def test_a_checkpoint_holds_the_same_model_in_fewer_bytes(
    llama: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    text = calibration_text(tmp_path)
    gptq = run(llama, tmp_path / "gptq", text, format="gptq", **changes)
    packed = run(llama, tmp_path / "ctp", text, format="ctp", **changes)
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours, theirs = (load_model(tmp_path / folder)(ids).logits for folder in ("ctp", "gptq"))
    assert torch.equal(ours, theirs)
    assert packed.linear_bits_per_weight < gptq.linear_bits_per_weight
    assert packed.checkpoint_bytes == sum(path.stat().st_size for path in (tmp_path / "ctp").glob("*.safetensors"))
    assert not any("no smaller" in note for note in packed.notes)
    weight_map = json.loads((tmp_path / "ctp" / "ctp.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == stored_tensors(tmp_path / "ctp").keys()

"""An exported adapter, loaded by PEFT itself, gives the logits of the prompt as inputs_embeds."""

import json

import pytest
import torch
from peft import PeftModel
from prompt_cases import load_case
from tiny_models import FAMILIES, tiny_model

from ctp_cli.prompts.peft_export import export_peft


@pytest.mark.parametrize("layout", ["prompt-text", "bos-prompt-text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_inputs_embeds(family, layout, tmp_path):
    case = load_case(tiny_model(family, tmp_path / "base"), tmp_path / "adapter", layout=layout)
    case.folder.mkdir()
    bos_id = case.tokenizer.bos_token_id if layout == "bos-prompt-text" else None
    notes = export_peft(case.prompt, case.folder, model=case.model, base_name=str(case.base), bos_id=bos_id)
    expected = case.expected_logits()
    adapted = PeftModel.from_pretrained(case.model, case.folder)
    with torch.no_grad():
        logits = adapted(input_ids=case.bare_ids()).logits
    assert (logits - expected[:, -logits.shape[1] :]).abs().max() < 1e-5
    assert "add_special_tokens=False" in notes[0]


def test_the_configuration_is_what_peft_itself_would_write(tmp_path):
    case = load_case(tiny_model("opt350", tmp_path / "base"), tmp_path / "adapter")
    case.folder.mkdir()
    export_peft(case.prompt, case.folder, model=case.model, base_name=str(case.base), bos_id=None)
    ours = json.loads((case.folder / "adapter_config.json").read_text())
    adapted = PeftModel.from_pretrained(case.model, case.folder)
    adapted.save_pretrained(tmp_path / "again")
    theirs = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {key: theirs[key] for key in ours} == ours
    assert ours["token_dim"] == 32  # OPT-350m's embeddings are narrower than its hidden states
    assert ours["base_model_name_or_path"] == str(case.base)

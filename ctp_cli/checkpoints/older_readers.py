"""What transformers 4 looks for in config.json: it ignores `rope_parameters`, and takes its defaults in silence."""

import copy
from typing import Any

from transformers import PretrainedConfig

_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def rotary_keys(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary settings under their former names; transformers 5, which reads those too, finds no others than before."""
    former = _former_names(config)
    # transformers 5 takes rope_scaling before rope_parameters, and not every family makes up for what it leaves out
    without_scaling = {key: value for key, value in former.items() if key != "rope_scaling"}
    return next((keys for keys in (former, without_scaling) if _reads_back(config, keys)), {})


def _former_names(config: PretrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    keys = {}
    if isinstance(local := rope.get("sliding_attention"), dict):
        keys["rope_local_base_freq"] = local.get("rope_theta")
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    names = _GPT_NEOX if config.model_type.startswith("gpt_neox") else {}
    outside = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    keys |= {names.get(key, key): value for key, value in outside.items()}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key not in outside}
    return keys


def _reads_back(config: PretrainedConfig, keys: dict[str, Any]) -> bool:
    if not keys:
        return False
    # from_dict moves settings about in the dictionaries it gets
    read = type(config).from_dict(copy.deepcopy({**config.to_dict(), **keys}))
    return bool(read.rope_parameters == config.rope_parameters)

"""GPTQ or SparseGPT by llm-compressor, on windows of token ids. Runs in an environment of its own.

    python benchmarks/peers/with_llmcompressor.py MODEL WINDOWS OUT --method gptq --bits 4 --group-size 64
    python benchmarks/peers/with_llmcompressor.py MODEL WINDOWS OUT --method sparsegpt --sparsity 0.5

Quantization is asymmetric unless told otherwise, everything else as llm-compressor has it. Prints one JSON line; the
checkpoint holds the resulting weights densely, so that any evaluator reads it, or with --packed as llm-compressor saves
them.
"""

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from peak import peak_bytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("gptq", "sparsegpt"), required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--dtype", default="auto", help="of the arithmetic; auto is the checkpoint's")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids_NT = load_file(given.windows)["ids"]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ids_NT.tolist()]
    if given.method == "gptq":
        weights = {
            "num_bits": given.bits,
            "type": "int",
            "symmetric": given.symmetric,
            "strategy": "group",
            "group_size": given.group_size,
        }
        group = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = GPTQModifier(config_groups=group, ignore=["lm_head"])
    else:
        recipe = SparseGPTModifier(sparsity=given.sparsity, targets=["Linear"], ignore=["re:.*lm_head"])
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=ids_NT.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    if given.packed:
        model.save_pretrained(given.out, save_compressed=True)
    else:
        plain = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype)
        names = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            if name in names:
                names[name].data.copy_(parameter.data)
        plain.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(json.dumps({"solve_seconds": seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()

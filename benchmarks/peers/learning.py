"""Learn a prompt in a process of its own and say, as one line of JSON, how long each step took and what it cost.

    python learning.py WHO MODEL BATCHES --dtype float32 --device cpu --out FILE

WHO is ctp; peft-loop: PEFT prompt tuning in the plain loop of its documentation; peft-trainer: the same in
transformers' Trainer. BATCHES is a safetensors file: ids (steps, B, T), start (P, D).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peak import peak_bytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

RATE, CLIP = 1e-2, 1.0


def ctp(network: Any, batches_SBT: torch.Tensor, start_PD: torch.Tensor) -> tuple[list[float], list[float]]:
    from accelerate import Accelerator

    from ctp_cli.data.batches import WholeText
    from ctp_cli.models.sharding import Frozen
    from ctp_cli.prompts import training
    from ctp_cli.prompts.losses import SoftPromptLoss

    steps, batch, seqlen = batches_SBT.shape
    settings = training.LearningSettings(steps, None, batch, (RATE,), 0.0, CLIP, 0.0, 10**9, 10**9, 0)
    module = SoftPromptLoss([Frozen(network.requires_grad_(False))], start_PD)
    state = training.Progressing(start_PD.clone(), start_PD.clone(), planned_steps=steps, learning_rate=RATE)
    batches = WholeText(batches_SBT.flatten(), seqlen, batch, seed=0)
    object.__setattr__(batches, "at", lambda step: batches_SBT[step])
    loop = training._Loop(module, state, batches, settings, Accelerator(cpu=network.device.type == "cpu"), None)
    return timed(loop.step, steps)


def peft_loop(network: Any, batches_SBT: torch.Tensor, start_PD: torch.Tensor) -> tuple[list[float], list[float]]:
    model = peft_model(network, start_PD)
    learnable = [p for p in model.parameters() if p.requires_grad]
    steps = len(batches_SBT)
    optimizer = torch.optim.AdamW(learnable, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling(steps))
    batches = iter(batches_SBT)

    def step() -> float:
        loss = model(**inputs(next(batches).to(network.device))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnable, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step, steps)


def peft_trainer(network: Any, batches_SBT: torch.Tensor, start_PD: torch.Tensor) -> tuple[list[float], list[float]]:
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps, batch, seqlen = batches_SBT.shape
    model = peft_model(network, start_PD)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.started)

    rows = [{key: value[0] for key, value in inputs(row[None]).items()} for row in batches_SBT.view(-1, seqlen)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=RATE,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=network.device.type == "cpu",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return times, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def peft_model(network: Any, start_PD: torch.Tensor) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=start_PD.shape[0])
    model = get_peft_model(network, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(start_PD)
    return model


def inputs(ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = ids_BT.clone()
    labels[:, 0] = -100  # ctp scores no window's first token: without a prompt nothing predicts it
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels}


def falling(steps: int) -> Any:
    return lambda step: (steps - step) / max(1, steps - 1) if step else 1.0


def timed(step: Any, steps: int) -> tuple[list[float], list[float]]:
    times, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - started)
    return times, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=("ctp", "peft-loop", "peft-trainer"))
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    held = load_file(given.batches)
    who = {"ctp": ctp, "peft-loop": peft_loop, "peft-trainer": peft_trainer}[given.who]
    network = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).to(given.device)
    times, losses = who(network, held["ids"], held["start"])
    peak = peak_bytes() if given.device == "cpu" else torch.cuda.max_memory_allocated()
    given.out.write_text(json.dumps({"times": times, "losses": losses, "peak_bytes": peak}))


if __name__ == "__main__":
    main()

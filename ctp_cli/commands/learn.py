"""ctp learn"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ctp_cli.commands.common import (
    Device,
    Force,
    Json,
    Output,
    Quiet,
    follows,
    newest_or,
    note_without_effect,
    reports_errors,
    shows_defaults,
)
from ctp_cli.commands.compress import EMBEDDED
from ctp_cli.console import Console, time_text
from ctp_cli.recipe import LearnSection, build

LENGTH, TRAINING, TEXT = "How long", "Training", "Text"


@reports_errors
@shows_defaults(LearnSection)
def learn(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Checkpoint(s) to learn on: compressions of one model. Default: the newest here."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="soft-prompt or kv-prefix.", rich_help_panel=TRAINING)] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Start from text:WORDS or an earlier prompt, not random rows (kv-prefix: the text's beginning).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Rows of the prompt (num_virtual_tokens).", rich_help_panel=TRAINING)
    ] = None,
    bos: Annotated[
        bool | None, typer.Option(help="The tokenizer's BOS stands before the prompt (Gemma).", rich_help_panel=TEXT)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; as many as fit --max-time by default.", rich_help_panel=LENGTH)
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(help="Of learning: 90s, 30m, 1.5h. Without --steps 30m by default.", rich_help_panel=LENGTH),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without gain before stopping.", rich_help_panel=LENGTH)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.", rich_help_panel=TRAINING)] = None,
    seqlen: Annotated[int | None, typer.Option(help="Text tokens per sequence.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            "--lr",
            "--learning-rate",
            help="A number, or auto. 1e-2 by default, of a kv-prefix 3e-2 (in standard deviations).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the model's weights: auto, checkpoint, float32, bfloat16.", rich_help_panel=TRAINING),
    ] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.", rich_help_panel=TRAINING)] = None,
    packed: Annotated[
        bool | None,
        typer.Option("--packed/--no-packed", help="Keep quantized weights packed in memory.", rich_help_panel=TRAINING),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Activations of one block at a time.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard",
            "--fsdp",
            help="Each process holds a part of the model (FSDP).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    tracker: Annotated[
        str | None, typer.Option(help="tensorboard, wandb, ... (accelerate's).", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the start and of the batches.", rich_help_panel=TRAINING)] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model to learn from beside the text: the uncompressed one.", rich_help_panel=TEXT),
    ] = None,
    teacher_share: Annotated[float | None, typer.Option(help="Its share of the loss.", rich_help_panel=TEXT)] = None,
    teacher_tokens: Annotated[
        int | None, typer.Option(help="Likeliest tokens kept per position.", rich_help_panel=TEXT)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=f"pydoc (of {EMBEDDED} the default), c4 (of others), wikitext2, ptb, or FILE[:COLUMN].",
            rich_help_panel=TEXT,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="Read the text while learning; FILE may be a pattern.", rich_help_panel=TEXT),
    ] = None,
    shuffle_buffer: Annotated[
        int | None, typer.Option(help="Windows among which a stream is shuffled.", rich_help_panel=TEXT)
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Text that selects the best prompt; by default the same source's, or a file's last tenth.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.", rich_help_panel=TEXT)] = None,
    validation_windows: Annotated[
        int | None, typer.Option(help="Windows per validation.", rich_help_panel=TEXT)
    ] = None,
    output: Output = None,
    force: Force = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a prompt on a frozen model, compressed or not, or on several compressions of it at once.

    \b
    ctp learn smollm2-135m-s50-w4 --max-time 10m
    ctp learn path/to/model --text mine.jsonl --tokens 50 --steps 500
    ctp learn model-s50-w4 model-w3 --method kv-prefix
    ctp learn model --text 'corpus/*.jsonl.gz' --stream
    torchrun --nproc-per-node 2 -m ctp_cli learn model --shard
    """
    console = Console(quiet=quiet or follows(), json_mode=json)
    given = {
        "method": method,
        "init": init,
        "tokens": tokens,
        "bos": bos,
        "steps": steps,
        "max_time": max_time,
        "patience": patience,
        "batch_size": batch_size,
        "seqlen": seqlen,
        "learning_rate": learning_rate,
        "dtype": dtype,
        "shard": shard,
        "mixed_precision": mixed_precision,
        "packed": packed,
        "gradient_checkpointing": gradient_checkpointing,
        "tracker": tracker,
        "seed": seed,
        "teacher": teacher,
        "teacher_share": teacher_share,
        "teacher_tokens": teacher_tokens,
        "text": text,
        "stream": stream,
        "shuffle_buffer": shuffle_buffer,
        "validation": validation,
        "validate_every": validate_every,
        "validation_windows": validation_windows,
    }
    section = build(LearnSection, given)
    note_without_effect(console, section)
    from ctp_cli.models.devices import resolve_device
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages.compress import KIND as COMPRESSED
    from ctp_cli.stages.learn import learn_prompt

    progress = console.progress()
    chosen = models or [newest_or((COMPRESSED,), EMBEDDED, console)]
    resolved = [resolve_model(name, progress) for name in chosen]
    name = resolved[0].name
    report = learn_prompt(
        section,
        models=resolved,
        teacher=resolve_model(section.teacher, progress) if section.teacher else None,
        output=output or Path(f"{name}-{'prompt' if section.method == 'soft-prompt' else 'prefix'}{section.tokens}"),
        device=resolve_device(device),
        force=force,
        progress=progress,
    )
    if follows():
        return
    console.table(
        f"learned {section.tokens} prompt tokens on {', '.join(one.name for one in resolved)}",
        ("", "validation perplexity"),
        [
            ("no prompt", f"{report.unprompted_perplexity:.3f}"),
            ("at the start", f"{report.start_perplexity:.3f}"),
            (f"learned (step {report.best_step} of {report.steps})", f"{report.best_perplexity:.3f}"),
        ],
        caption=f"{time_text(report.seconds)} of learning; this text chose the prompt, so report on another one",
    )
    console.document("learn", asdict(report) | {"path": str(report.path), "prompt_file": str(report.prompt_file)})
    console.result(str(report.prompt_file))
    extra = [] if section.method == "soft-prompt" else ["--format", "kv"]
    console.next_step("ctp", "stitch", report.prompt_file, chosen[0], *extra)

"""Run a recipe's stages in order, skipping what is already made with the same settings from the same inputs."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctp_cli import artifact
from ctp_cli.data.sources import file_of, known_names, split_spec
from ctp_cli.data.streams import open_stream
from ctp_cli.errors import GateFailedError, OutputError, RecipeError
from ctp_cli.files import read_json
from ctp_cli.models.resolve import ResolvedModel, resolve_model
from ctp_cli.progress import SILENT, Progress
from ctp_cli.recipe import EvalSection, LearnSection, Recipe

FULL, COMPRESSED, PROMPTED = "full", "compressed", "compressed + prompt"
REPORT = "report"


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: where its artifact goes, the key that stands for everything it depends on."""

    section: str
    """Of the recipe."""
    name: str
    output: Path
    key: str
    again: bool
    """To be made though it is made: it was asked for, or a stage before it was."""
    before: "Step | None"
    """The stage whose result this one uses; None where it is the model alone."""
    make: Callable[[bool], Any]
    """The argument: replace what is there."""

    @property
    def made(self) -> bool:
        return not self.again and self._carries(made_for=self.key, made_from=self.made_from)

    @property
    def outdated(self) -> bool:
        """Whether it was made with these settings from something that is no longer there, or not as it was."""
        return self._carries(made_for=self.key) and not self._carries(made_from=self.made_from)

    @property
    def made_from(self) -> str | None:
        """A hash that changes whenever the stage before is made again, "" while it is not there."""
        if self.before is None:
            return None
        manifest = self.before.output / artifact.MANIFEST
        return artifact.file_fingerprint(manifest) if manifest.is_file() else ""

    def _carries(self, **marks: str | None) -> bool:
        """Whether what is in the stage's folder says so of itself."""
        manifest = artifact.manifest_of(self.output)
        return manifest is not None and all(manifest.get(name) == mark for name, mark in marks.items())


@dataclass
class Plan:
    """The steps of a recipe, in order, on a resolved model."""

    recipe: Recipe
    model: ResolvedModel
    steps: list[Step] = field(default_factory=list)

    def output(self, name: str) -> Path:
        return Path(self.recipe.output) / name


def plan(
    recipe: Recipe, *, device: str, force: bool = False, redo: Collection[str] = (), progress: Progress = SILENT
) -> Plan:
    """Resolve the model and lay out the steps; loads no weights.

    `redo` names sections of the recipe: their stages, and those that use what they make, are made again; `force`
    replaces what was made with other settings. Raises RecipeError if the recipe has no such stage, OutputError if a
    step's folder holds something made with other settings, unless `force`.
    """
    made = Plan(recipe, resolve_model(recipe.model, progress))
    _Builder(made, device, force, frozenset(redo), progress).build()
    sections = list(dict.fromkeys(step.section for step in made.steps))
    for name in redo:
        if name not in sections:
            raise RecipeError(f"--redo {name}: not a stage of this recipe", hint=f"it has {', '.join(sections)}")
    if not force:
        for step in made.steps:
            if step.output.exists() and not (step.again or step.made or step.outdated):
                raise OutputError(
                    f"{step.output} exists and was made with other settings or inputs",
                    hint="give the recipe another output (--set output=...), or replace it with --force",
                )
    return made


def run(steps: Plan, *, progress: Progress = SILENT) -> list[tuple[Step, bool]]:
    """Make what is not made yet, or to be made again. Returns each step with True where it was left as it is."""
    done = []
    for step in steps.steps:
        already = step.made
        if already:
            progress.say(f"{step.name}: already made, {step.output}")
        else:
            progress.say(f"{step.name}: making {step.output}")
            with artifact.made_for(step.key, step.made_from):
                step.make(step.again or step.outdated)
        done.append((step, already))
    return done


def check_gates(steps: Plan) -> None:
    """Raises GateFailedError if a perplexity or latency is above what the recipe allows, whenever it was measured."""
    recipe = steps.recipe
    over = []
    if recipe.eval is not None and recipe.eval.max_ppl is not None:
        for score in read_json(steps.output("evaluation") / "scores.json")["scores"]:
            if not score["perplexity"] <= recipe.eval.max_ppl:
                over.append(f"perplexity of {score['label']} on {score['text']} is {score['perplexity']:.2f}")
    if recipe.bench is not None and recipe.bench.max_latency_ms is not None:
        for row in read_json(steps.output("benchmark") / "latency.json")["rows"]:
            if row["per_token_ms"]["median"] > recipe.bench.max_latency_ms:
                over.append(f"a token behind {row['prompt_tokens']} takes {row['per_token_ms']['median']:.1f} ms")
    if over:
        raise GateFailedError("above the recipe's limits: " + "; ".join(over))


@dataclass
class _Builder:
    plan: Plan
    device: str
    force: bool
    redo: frozenset[str]
    progress: Progress

    def build(self) -> None:
        """Keys chain: a step's key holds the keys of the steps whose results it uses."""
        recipe, base = self.plan.recipe, self.plan.model
        root = artifact.folder_fingerprint(base.path)
        subject, subject_key = base, root
        if recipe.compress is not None:
            subject_key = self._compress(root)
            subject = self._made_model("compressed")
        prompt_key = None
        if recipe.learn is not None:
            prompt_key = self._learn(subject, subject_key)
            if recipe.stitch is not None:
                self._stitch(subject, prompt_key)
        if recipe.eval is not None:
            evaluation_key = self._eval(recipe.eval, subject, prompt_key or subject_key)
            if recipe.compress is not None:
                self._report(evaluation_key)
        if recipe.bench is not None:
            # a kv-prefix has no rows to be cut; times depend on lengths alone
            rows = recipe.learn is not None and recipe.learn.method == "soft-prompt"
            self._bench(subject, prompt_key or subject_key, with_prompt=rows)

    def _made_model(self, name: str) -> ResolvedModel:
        base = self.plan.model
        return ResolvedModel(self.plan.output(name).resolve(), f"{base.name}-{name}", base.embedded)

    def _add(self, section: str, name: str, settings: Any, upstream: str, make: Callable[[Path, bool], Any]) -> str:
        """`make` gets the folder, and whether to replace what is there."""
        content = json.dumps([name, settings, upstream], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        before = next((step for step in self.plan.steps if step.key == upstream), None)
        again = section in self.redo or (before is not None and before.again)
        output = self.plan.output(name)
        step = Step(section, name, output, key, again, before, lambda replace: make(output, self.force or replace))
        self.plan.steps.append(step)
        return key

    def _compress(self, upstream: str) -> str:
        from ctp_cli.stages.compress import compress

        section = self.plan.recipe.compress
        assert section is not None
        options: dict[str, Any] = {"device": self.device, "progress": self.progress}
        return self._add(
            "compress",
            "compressed",
            [section.model_dump(exclude={"max_memory"}), _text_key(section.calibration)],
            upstream,
            lambda output, force: compress(section, model=self.plan.model, output=output, force=force, **options),
        )

    def _learn(self, subject: ResolvedModel, upstream: str) -> str:
        from ctp_cli.stages.learn import learn_prompt

        given = self.plan.recipe.learn
        assert given is not None
        seed = given.seed if "seed" in given.model_fields_set else self.plan.recipe.seed
        section = LearnSection.model_validate(given.model_dump() | {"seed": seed})
        options: dict[str, Any] = {"device": self.device, "progress": self.progress}
        return self._add(
            "learn",
            "prompt",
            [
                section.model_dump(),
                _stream_key(section.text) if section.stream else _text_key(section.text),
                _text_key(section.validation),
                *(_place_key(place) for place in (section.init, section.teacher) if place is not None),
            ],
            upstream,
            lambda output, force: learn_prompt(
                section,
                models=[subject],
                teacher=resolve_model(section.teacher) if section.teacher else None,
                output=output,
                force=force,
                **options,
            ),
        )

    def _stitch(self, subject: ResolvedModel, upstream: str) -> str:
        from ctp_cli.stages.stitch import stitch

        section = self.plan.recipe.stitch
        assert section is not None
        return self._add(
            "stitch",
            "stitched",
            section.model_dump(),
            upstream,
            lambda output, force: stitch(
                section,
                prompt_path=self.plan.output("prompt"),
                model_path=subject.path,
                output=output,
                force=force,
                progress=self.progress,
            ),
        )

    def _eval(self, section: EvalSection, subject: ResolvedModel, upstream: str) -> str:
        from ctp_cli.stages.eval import Target, evaluate

        targets = [Target(FULL, self.plan.model)]
        if self.plan.recipe.compress is not None:
            targets.append(Target(COMPRESSED, subject))
        if self.plan.recipe.learn is not None:
            label = PROMPTED if self.plan.recipe.compress is not None else f"{FULL} + prompt"
            targets.append(Target(label, subject, self.plan.output("prompt")))
        options: dict[str, Any] = {"device": self.device, "progress": self.progress}
        return self._add(
            "eval",
            "evaluation",
            [section.model_dump(exclude={"max_ppl"}), [_text_key(text) for text in section.ppl]],
            upstream,
            lambda output, force: evaluate(section, targets=targets, output=output, force=force, **options),
        )

    def _bench(self, subject: ResolvedModel, upstream: str, *, with_prompt: bool) -> str:
        from ctp_cli.stages.bench import bench

        section = self.plan.recipe.bench
        assert section is not None
        return self._add(
            "bench",
            "benchmark",
            section.model_dump(exclude={"max_latency_ms"}),
            upstream,
            lambda output, force: bench(
                section,
                model_path=subject.path,
                prompt_path=self.plan.output("prompt") if with_prompt else None,
                output=output,
                device=self.device,
                force=force,
                progress=self.progress,
            ),
        )

    def _report(self, upstream: str) -> str:
        def draw(output: Path, force: bool) -> None:
            from ctp_cli.benchmark.figures import recovery_figure

            scores = read_json(self.plan.output("evaluation") / "scores.json")["scores"]
            texts: dict[str, dict[str, tuple[float, float]]] = {}
            for score in scores:
                texts.setdefault(score["text"], {})[score["label"]] = (
                    score["perplexity"],
                    score["standard_error"],
                )
            with artifact.workspace(output, kind=REPORT, identity={"scores": upstream}, force=force) as space:
                recovery_figure(
                    texts,
                    space.path / "recovery.png",
                    title=f"{self.plan.model.name}: perplexity, lower is better",
                )
                space.finish({"recipe": self.plan.recipe.model_dump(), "results": texts})

        return self._add("eval", REPORT, None, upstream, draw)


def _place_key(place: str) -> str:
    """As `_text_key`, of a prompt or model: a file, a folder, or a name."""
    path = Path(place)
    if path.is_dir():
        return artifact.folder_fingerprint(path)
    return artifact.file_fingerprint(path) if path.is_file() else place


def _stream_key(spec: str | None) -> str | None:
    """As `_text_key`, of a streamed text, which may be many files."""
    if spec is None or split_spec(spec)[1] in known_names():
        return spec
    return open_stream(spec).fingerprint()


def _text_key(spec: str | None) -> str | None:
    """A local file's content is part of what a step depends on; a named text is known by its name."""
    if spec is None:
        return None
    file = file_of(spec)
    return spec if file is None else artifact.file_fingerprint(file)

# ruff: noqa: E501 - tables of what to write are read best in long lines
"""Recipes: text, values, and what only YAML has."""

import json
import random
import shutil
from pathlib import Path

import yaml

from ctp_cli.errors import CtpError
from ctp_cli.recipe import load
from hostile.damage import damage_value, damaged_bytes
from hostile.inputs import RECIPE, Inputs, Mutant


def recipe_mutant(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    (place / "model").symlink_to(inputs.folder / "dense")
    shutil.copyfile(inputs.folder / "text.txt", place / "text.txt")
    content = RECIPE.encode()
    if (how := draw.random()) < 0.3:
        content, what = damaged_bytes(draw, content)
    elif how < 0.65:
        value = yaml.safe_load(RECIPE)
        what = ", ".join(damage_value(draw, value) for _ in range(draw.choice((1, 1, 2))))
        content = json.dumps(value).encode("utf-8", "surrogatepass")  # is YAML, too
    else:
        text, what = _yaml_text(draw)
        content = text.encode("utf-8", "surrogatepass")
    (place / "r.yaml").write_bytes(content)
    harmless = _is_a_moments_work(place / "r.yaml")
    return Mutant(("run", "r.yaml") if harmless and draw.random() < 0.4 else ("run", "r.yaml", "--dry-run"), what)


def _yaml_text(draw: random.Random) -> tuple[str, str]:
    """What only YAML has: anchors, tags, odd numbers, many documents."""
    line = draw.choice([line for line in RECIPE.splitlines() if ": " in line and line[0] != "#" and "{" not in line])
    key = line.split(":")[0]
    value = draw.choice(
        ("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary aGVsbG8=", "!!set {a, b}",
         "!!omap [a: 1]", "!!timestamp 2001-99-99", "2001-01-01", "2001-01-01 25:00:00", "!!int 'x'", "!!float 'x'",
         "0x" + "f" * 5000, "0x" + "f" * 40, "0b" + "1" * 20_000, "9" * 5000, "1:99:99:99", "1_000", "1e5", ".inf", ".nan",
         "-.inf", "0o17", "017", "~", "yes", "off", "=", "<<", "|\n  a\n  b", ">-\n  a", "*unknown", "&a [*a]", "&a {b: *a}",
         "? [a]\n  : b", "{[1, 2]: 3}", "{1: 2}", "{null: 1}", "{? {a: b} : c}", '"\\u0000"', '"\\ud800"', '"\\x07"',
         "'" + "a" * 300_000 + "'", "\t1", "- a", "%TAG ! x", "!<!> x", "! x", "!!str 5", "!!null ''", "!!bool 7",
         "!!merge x", "[" * 3000, "{" * 500, "[" * 50 + "]" * 50, "{a: " * 200 + "}" * 200, "!!seq {}", "!!map []", "/x/\0")
    )  # fmt: skip
    choice = draw.randrange(12)
    if choice == 0:
        depth = draw.choice((3, 7, 9, 25))
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, depth))
        target = draw.choice(
            ("eval: {ppl: *a%d}", "seed: *a%d", "compress: *a%d", "bench: {prompt_len: *a%d}", "x: *a%d")
        )
        return bomb + RECIPE + target % (depth - 1) + "\n", f"aliases of aliases, {depth} deep"
    if choice == 1:
        depth = draw.choice((3, 8, 25))
        bomb = "m0: &m0 {a: 1}\n" + "".join(
            f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, depth)
        )
        return bomb + RECIPE, f"merges of merges, {depth} deep"
    if choice == 2:
        return "".join(f"key{i}: {i}\n" for i in range(draw.choice((50, 3000, 100_000)))) + RECIPE, "many keys"
    if choice == 3:
        return RECIPE + "---\n" + RECIPE, "two documents"
    if choice == 4:
        return RECIPE + line + "\n", f"{key.strip()} twice"
    if choice == 5:
        return "? " * draw.choice((10, 5000)) + "a\n" + RECIPE, "question marks"
    return RECIPE.replace(line, f"{key}: {value}"), f"{key.strip()}: {value[:40]}"


def _is_a_moments_work(recipe: Path) -> bool:
    """Whether running it is quick and writes where it may; numbers that ask for hours of work are no attack."""
    try:
        asked = load(recipe)
    except (CtpError, Exception):
        return False
    compress, learn, scored, bench = asked.compress, asked.learn, asked.eval, asked.bench
    return not (
        asked.output not in ("made", "/dev/null/x", "a\0b", "", "..", "x" * 5000, "a" * 100_000)
        or (compress and compress.windows * compress.seqlen + 100 * compress.rounds + compress.tune_windows > 2000)
        or (compress and compress.refine > 20)
        or (learn and (learn.steps is None or learn.steps * learn.batch_size * (learn.seqlen + learn.tokens) > 3000))
        or (learn and learn.validation_windows > 50)
        or (scored and scored.windows * scored.seqlen > 30_000)
        or (bench and (bench.seqlen + bench.new_tokens + sum(bench.prompt_len)) * bench.rounds > 3000)
    )

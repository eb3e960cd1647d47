"""Run by torchrun: learns the same prompts with the model whole in every process, and sharded.

torchrun --nproc-per-node 2 sharded_runs.py DENSE PACKED OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from accelerate import Accelerator
from learning_runs import run


def cases(dense: Path, packed: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    return {
        "soft-prompt": (dense, {}),
        "kv-prefix": (dense, {"method": "kv-prefix"}),
        "packed, 16 bits": (packed, {"dtype": "bfloat16"}),
        "teacher": (packed, {"teacher": str(dense), "teacher_tokens": 8}),
    }


def main(dense: Path, packed: Path, output: Path) -> None:
    Accelerator.end_training = Accelerator.wait_for_everyone  # it would part the processes after one run
    for name, (model, changes) in cases(dense, packed).items():
        for where in ("whole", "sharded"):
            run(model, output / where / name, shard=where == "sharded", **changes)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

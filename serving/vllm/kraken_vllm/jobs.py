"""Runs models in vLLM for a program that has another environment: python -m kraken_vllm.jobs JOBS RESULTS

JOBS is a JSON list, each with the `settings` of an `LLM` and `calls`: lists of prompts of token ids, each with the
number of new tokens. RESULTS gets a list with an entry for each: the `calls`, each with the `seconds` that it took, the
`tokens` of each prompt and how many of its tokens were `cached`; or the `error`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Call = list[tuple[list[int], int]]


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    entries = json.loads(jobs.read_text(encoding="utf-8"))
    if all(entry["settings"].get("tensor_parallel_size", 1) == 1 for entry in entries):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process, which saves seconds
    results.write_text(json.dumps([run(entry["settings"], entry["calls"]) for entry in entries]), encoding="utf-8")


def run(settings: dict[str, Any], calls: list[Call]) -> dict[str, Any]:
    from vllm import LLM

    if settings.get("tensor_parallel_size", 1) == 1:
        settings = {**settings, "distributed_executor_backend": "uni"}
    try:
        llm = LLM(**settings, seed=0, disable_log_stats=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"calls": [answer(llm, call) for call in calls]}


def answer(llm: Any, call: Call) -> dict[str, Any]:
    """The most likely tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in call]
    sampling = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False) for _, tokens in call
    ]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"seconds": seconds, "tokens": tokens, "cached": [output.num_cached_tokens for output in outputs]}


if __name__ == "__main__":
    main()

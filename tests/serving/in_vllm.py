"""Runs in vLLM's environment, which has none of our packages but the plugin: `python in_vllm.py JOBS RESULTS`.

JOBS is a JSON list, each with the `settings` of an `LLM` and `calls`, lists of prompts of token ids with numbers of new
tokens. RESULTS gets a list with an entry for each: the `calls`, lists of the tokens of each prompt, and how many of its
tokens came from the prefix cache; or the `error`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def run(settings: dict[str, Any], calls: list[list[tuple[list[int], int]]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # noqa: PLC0415 (reads the environment, which is set below)

    if settings.get("tensor_parallel_size", 1) == 1:
        settings = {**settings, "distributed_executor_backend": "uni"}  # in this process, which saves seconds
    try:
        llm = LLM(**settings, seed=0, disable_log_stats=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answered = []
    for call in calls:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in call]
        sampling = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False) for _, tokens in call
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answered.append([(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs])
    return {"calls": answered}


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    entries = json.loads(jobs.read_text(encoding="utf-8"))
    if all(entry["settings"].get("tensor_parallel_size", 1) == 1 for entry in entries):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    results.write_text(json.dumps([run(entry["settings"], entry["calls"]) for entry in entries]), encoding="utf-8")

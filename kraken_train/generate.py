"""Continues prompts with generated text: python -m kraken_train.generate export_dir=EXPORT prompt="Once upon a time"

Under a launcher (torchrun, deepspeed, srun) all ranks serve one model together, each with a part of its sub-layers or
heads; the text is the same, and rank 0 prints it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoints.exports.folder import DTYPES, read_export
from data_prep.records import BYTE_ORDER_MARK
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import require_regular
from kraken_train.common.free_text import FilePath, Text
from kraken_train.common.locales import prints_unicode
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.inference.engine import ExecutionConfig
from kraken_train.inference.generation import continue_prompts, require_servable
from kraken_train.inference.ranks import COLLECTIVES, device_speeds, end_rank, started_ranks
from kraken_train.inference.sampling import Sampling
from kraken_train.inference.serving import start_engine
from kraken_train.parallel.device import DEVICES
from kraken_train.parallel.ranks import Runtime


@dataclass(frozen=True)
class GenerateConfig:
    """See conf/generate.yaml."""

    export_dir: FilePath  # folder that checkpoints.export has written
    prompt: Text | None  # text to continue; "" begins a document; null: prompts_file has the prompts
    # file with a prompt on each line; the output has a JSON string with prompt and continuation for each; null: prompt
    # is the only one
    prompts_file: FilePath | None
    max_new_tokens: int  # tokens to generate
    temperature: float  # of the distribution to draw from; 0 takes the most likely token
    top_k: int | None  # draw from this many of the most likely tokens; null: from all
    top_p: float | None  # draw from the most likely tokens that together have this probability; null: from all
    seed: int  # with the number of the prompt's line it decides what is drawn; batch_size does not
    batch_size: int  # prompts of a file at a time
    # float32 | bfloat16, in which several tokens often have equal logits, so that the batch or the number of devices
    # decides
    dtype: str
    device: str  # auto | cpu | cuda
    # relative speeds of the ranks' devices, as in [1.0,1.0,0.5]: slower ones get less work; null: equal
    devices: tuple[float, ...] | None
    # auto | library (NCCL or gloo) | symmetric (of small tensors over memory that all GPUs read); auto: symmetric
    # behind NVSwitch
    collectives: str
    compile: bool  # torch.compile: faster per token, slower to start
    cuda_graphs: bool  # record the kernels once and replay them; needs a GPU
    # prompts are padded to the next of these numbers of tokens, as in [128,512], and CUDA graphs recorded for each;
    # null: on a GPU powers of two and their middles from 64, elsewhere none
    prefill_lengths: tuple[int, ...] | None
    # compute what lies between a Kraken's matrix products with Triton kernels; null: on a GPU where Triton is installed
    fused_kernels: bool | None = None

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("max_new_tokens", self.max_new_tokens)
        require_positive("batch_size", self.batch_size)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("device", self.device, DEVICES)
        require_choice("collectives", self.collectives, COLLECTIVES)
        if (self.prompt is None) == (self.prompts_file is None):
            raise ConfigError("give either prompt=TEXT or prompts_file=FILE, with one prompt a line")
        if self.prompt is not None and any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ConfigError("prompt is not valid UTF-8")
        self.sampling.validate()
        self.execution.validate()

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def execution(self) -> ExecutionConfig:
        return ExecutionConfig(self.compile, self.cuda_graphs, self.prefill_lengths, self.fused_kernels)


def print_continuations(config: GenerateConfig) -> None:
    """Print each prompt with its continuation: a single one as plain text, those of a file as a line of JSON each."""
    with started_ranks(config.device) as runtime:
        generate(config, runtime)


def generate(config: GenerateConfig, runtime: Runtime) -> None:
    speeds = device_speeds(config.devices, runtime)
    export = read_export(Path(config.export_dir))
    tokenizer = export.load_tokenizer()
    texts = read_prompts(config)
    prompts = [list(ids) for ids in tokenizer.encode_batch(list(texts.values()))]
    if config.prompt == "":
        prompts = [[tokenizer.end_of_document]]  # as in training, where a document follows the end of another
    for name, prompt in zip(texts, prompts, strict=True):
        require_servable(prompt, config.max_new_tokens, export.config, name)
    engine = start_engine(
        export,
        runtime,
        speeds,
        batch_size=min(config.batch_size, len(prompts)),
        prompt_tokens=max(len(prompt) for prompt in prompts),
        max_new_tokens=config.max_new_tokens,
        dtype=DTYPES[config.dtype],
        execution=config.execution,
        collectives=config.collectives,
    )
    for first in range(0, len(prompts), engine.batch_size):
        rows = continue_prompts(
            engine,
            prompts[first : first + engine.batch_size],
            config.max_new_tokens,
            config.sampling,
            first_row=first,
            end_of_document=tokenizer.end_of_document,
            vocab_size=tokenizer.vocab_size,
        )
        for row in rows if runtime.is_first else []:
            text = tokenizer.decode([token for token in row if token != tokenizer.end_of_document])
            print(
                text if config.prompt is not None else json.dumps(text, ensure_ascii=not prints_unicode()), flush=True
            )


def read_prompts(config: GenerateConfig) -> dict[str, str]:
    """The prompts by their names in messages. Raises ConfigError."""
    if config.prompt is not None:
        return {"prompt": config.prompt}
    path = Path(str(config.prompts_file))
    require_regular(path, "prompts_file", ConfigError)
    try:
        text = path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode()  # as preparation reads files
    except OSError as error:
        raise ConfigError(f"prompts_file={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts_file={path} is not valid UTF-8 (byte {error.start})") from error
    # Only at \n or \r\n, not at Unicode's other line separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text:
        raise ConfigError(f"prompts_file={path} is empty; write one prompt a line")
    return {f"line {number} of prompts_file={path}": line for number, line in enumerate(lines, start=1)}


def main() -> None:
    run_entry(print_continuations, GenerateConfig, "generate")
    end_rank()


if __name__ == "__main__":
    main()

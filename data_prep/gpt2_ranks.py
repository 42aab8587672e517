"""GPT-2's merge ranks: from tiktoken's cache or the network, and to and from a file of tiktoken's own format.

A rank file has a line `BASE64 RANK` for each of the 50256 byte sequences.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from pathlib import Path

import tiktoken

from kraken_train.common.errors import DataError
from kraken_train.common.files import read_file

NUM_RANKS = 50256
LONGEST_WAIT = 60  # seconds; tiktoken itself would wait for ever on a network that swallows packets
# Equal ids; "gpt2" is made from two files and "r50k_base" from one, and a cache may hold either.
ENCODINGS = ("gpt2", "r50k_base")


def find_ranks() -> dict[bytes, int]:
    """Raises DataError, with what to do, if neither tiktoken's cache nor the network has them."""
    found: list[dict[bytes, int]] = []
    reasons: list[str] = []

    def load() -> None:
        for name in ENCODINGS:
            try:
                found.append(tiktoken.get_encoding(name)._mergeable_ranks)
                return
            except Exception as error:  # of the HTTP client, of its sockets, or of a damaged cache
                reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(LONGEST_WAIT)
    if found:
        return found[0]
    reason = reasons[0][:200] if reasons else f"no answer within {LONGEST_WAIT} s"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    raise DataError(
        f"tokenizer=gpt2 is neither in tiktoken's cache (TIKTOKEN_CACHE_DIR={cache}) "
        f"nor on the network ({reason}); where there is a network, run TIKTOKEN_CACHE_DIR=FOLDER python -c "
        "\"import tiktoken; tiktoken.get_encoding('gpt2')\", copy FOLDER here and set TIKTOKEN_CACHE_DIR to it"
    )


def write_ranks(ranks: dict[bytes, int], path: Path) -> None:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    path.write_bytes(b"".join(lines))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Raises DataError if the file is missing, cut off or of another tokenizer."""
    try:
        fields = [line.split() for line in read_file(path).splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in fields}
    except (OSError, ValueError, binascii.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the folder again or prepare the data again") from error
    bytes_ = {bytes([byte]) for byte in range(256)}
    if len(ranks) != NUM_RANKS or set(ranks.values()) != set(range(NUM_RANKS)) or not bytes_ <= ranks.keys():
        raise DataError(
            f"{path} holds {len(ranks)} ranks, but GPT-2's tokenizer has {NUM_RANKS}, one for each byte among them; "
            "copy the folder again or prepare the data again"
        )
    return ranks

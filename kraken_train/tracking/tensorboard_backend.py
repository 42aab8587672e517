"""The backend for TensorBoard: RUN_DIR/tensorboard, written again from metrics.jsonl whenever that was replaced.

Uses the writer of the package `tensorboard`, so torch need not be loaded.
"""

from __future__ import annotations

import time
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from kraken_train.tracking.backend import event_line, numbers
from kraken_train.tracking.run_info import RunInfo

FOLDER = "tensorboard"


class TensorBoardBackend:
    """Shows the content of metrics.jsonl: of a step that was repeated after a crash or a rollback, the last results."""

    def __init__(self, run_info: RunInfo) -> None:
        self.folder = run_info.path / FOLDER
        self.config = yaml.safe_dump({**run_info.settings, **run_info.facts}, sort_keys=False)
        self.events: list[dict[str, Any]] = []
        self.writer = self.begin()

    def begin(self) -> EventFileWriter:
        outdated = sorted(self.folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
        writer = EventFileWriter(str(self.folder))
        # A TensorBoard that has read older files forgets their steps. It cannot continue from a deleted file, so the
        # newest of them stays.
        writer.add_event(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        for file in outdated[:-1]:
            file.unlink()
        writer.add_event(summary([text("config", f"```\n{self.config}```")], step=0))
        self.logged = 0
        return writer

    def log(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if step > self.logged:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
            self.writer.add_event(summary(values, step))
            self.logged = step

    def log_event(self, event: dict[str, Any], news: bool) -> None:
        """A line of text, and a curve that counts the events of its kind."""
        self.events.append(event)
        kind = event.get("event")
        count = sum(other.get("event") == kind for other in self.events)
        values = [text("events", event_line(event)), Summary.Value(tag=f"events/{kind}", simple_value=count)]
        self.writer.add_event(summary(values, int(event.get("step") or self.logged)))

    def restart(self) -> None:
        self.writer.close()
        self.writer = self.begin()
        events, self.events = self.events, []
        for event in events:
            self.log_event(event, news=False)

    def close(self, exit_code: int) -> None:
        self.writer.close()


def summary(values: list[Summary.Value], step: int) -> Event:
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def text(tag: str, words: str) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[words.encode()]))

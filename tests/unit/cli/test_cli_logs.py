"""Log lines of children: whole, told apart, bounded."""

from __future__ import annotations

import asyncio
import io

from services.cluster.log_stream import LogPump, LogStream
from services.cluster.supervisor import own_words
from shared.logging import LogFormat


async def pumped(log_format: LogFormat, *chunks: bytes) -> tuple[str, LogPump]:
    output = io.StringIO()
    pump = LogPump("worker-0", LogStream(output, log_format, name_width=8))
    reader = asyncio.StreamReader()
    for chunk in chunks:
        reader.feed_data(chunk)
    reader.feed_eof()
    await pump.run(reader)
    return output.getvalue(), pump


async def test_text_lines_carry_the_childs_name_wherever_the_pipe_cut_them() -> None:
    text, _ = await pumped(LogFormat.TEXT, b"one\ntw", b"o\nthr", b"ee")
    assert text == "worker-0 | one\nworker-0 | two\nworker-0 | three\n"


async def test_json_lines_stay_json() -> None:
    text, _ = await pumped(LogFormat.JSON, b'{"a": 1}\n')
    assert text == '{"a": 1}\n'


async def test_an_endless_line_is_broken_up_and_nothing_of_it_is_lost() -> None:
    text, _ = await pumped(LogFormat.JSON, b"x" * 100_000, b"\n")
    assert text.count("x") == 100_000
    assert max(map(len, text.split("\n"))) <= 64 * 1024


async def test_bytes_that_are_no_text_do_not_stop_the_log() -> None:
    text, _ = await pumped(LogFormat.TEXT, b"\xff\xfe\n", b"next\n")
    assert text.endswith("worker-0 | next\n")


async def test_the_last_words_are_remembered() -> None:
    _, pump = await pumped(LogFormat.TEXT, b"loading\nkunserve worker: too small\n\n")
    assert own_words(pump.last_line) == "too small"


async def test_a_silent_child_has_no_last_words() -> None:
    _, pump = await pumped(LogFormat.TEXT)
    assert own_words(pump.last_line) == "it left no word"


def test_only_a_commands_name_is_taken_off() -> None:
    assert own_words("OSError: no space") == "OSError: no space"

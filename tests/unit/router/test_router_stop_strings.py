"""Stop strings: found wherever the pieces are cut, and no text is held longer than needed."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.router.stop_strings import StopStringScanner

TEXT = st.text(alphabet="ab", max_size=25)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def scan(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    scanner = StopStringScanner(stops, include_in_output=include)
    shown = ""
    for piece in pieces:
        found = scanner.push(piece)
        shown += found.text
        if found.matched is not None:
            return shown, found.matched
    return shown + scanner.finish(), None


@given(TEXT, STOPS, st.lists(st.integers(0, 25), max_size=6), st.booleans())
def test_the_cuts_do_not_matter(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    ends = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    assert scan(stops, pieces, include) == scan(stops, list(text), include)


@given(TEXT, STOPS)
def test_what_is_shown_holds_no_stop_string(text: str, stops: list[str]) -> None:
    shown, matched = scan(stops, list(text))
    assert not any(stop in shown for stop in stops)
    assert (matched is None) == (not any(stop in text for stop in stops))
    assert text.startswith(shown + (matched or ""))
    if matched is None:
        assert shown == text


def test_only_a_possible_beginning_is_held() -> None:
    scanner = StopStringScanner(["END"], include_in_output=False)
    assert scanner.push("the E").text == "the "
    assert scanner.push("N").text == ""
    assert scanner.push("O").text == "ENO"
    assert scanner.finish() == ""


def test_the_stop_string_is_shown_when_asked_for() -> None:
    assert scan(["END"], ["the E", "ND and"], include=True) == ("the END", "END")


def test_of_two_the_one_complete_first_counts() -> None:
    assert scan(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert scan(["c", "abc"], ["xabc"]) == ("x", "abc")


def test_text_that_passes_unscanned_cannot_begin_a_match() -> None:
    scanner = StopStringScanner(["ab"], include_in_output=False)
    assert scanner.pass_through("xa") == "xa"
    assert scanner.push("b").text == "b"

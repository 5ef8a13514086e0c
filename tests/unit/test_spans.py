"""What a chunk may see: ranges of frames, against the rule counted out frame by frame."""

import pytest

from afd_train.students.spans import (
    Range,
    Span,
    Window,
    block_causal_spans,
    committed_spans,
    continuation_spans,
    teacher_forcing_spans,
)

WINDOWS = [(None, 0), (2, 0), (4, 0), (3, 1), (5, 2), (6, 2), (100, 3)]


def frames_of(ranges: tuple[Range, ...]) -> list[int]:
    return [frame for first, stop in ranges for frame in range(first, stop)]


def rule(stop: int, window: int | None, sink: int) -> list[int]:
    """Frames that a chunk which ends at `stop` sees: the latest, the first `sink` of all among `window`."""
    if window is None or stop <= window:
        return list(range(stop))
    return [frame for frame in range(stop) if frame < sink or frame >= stop - (window - sink)]


def test_every_chunk_sees_itself_and_the_chunks_before():
    assert block_causal_spans(4, 2) == (Span((0, 2), ((0, 2),)), Span((2, 4), ((0, 4),)))


def test_a_noisy_chunk_sees_the_clean_chunks_before_it_and_itself():
    assert teacher_forcing_spans(4, 2) == (
        *block_causal_spans(4, 2),
        Span((4, 6), ((4, 6),)),
        Span((6, 8), ((0, 2), (6, 8))),
    )


def test_copies_share_the_clean_half():
    spans = teacher_forcing_spans(4, 2, copies=2)
    assert spans[:4] == teacher_forcing_spans(4, 2)
    assert spans[4:] == (Span((8, 10), ((8, 10),)), Span((10, 12), ((0, 2), (10, 12))))


def test_a_continuation_sees_the_cache_before_it_and_itself():
    # Frames 2 to 6 of a clip, whose chunks start at 2 and 4.
    assert continuation_spans(2, 4, 2) == (
        Span((0, 2), ((0, 2),), ((0, 2),)),
        Span((2, 4), ((2, 4),), ((0, 4),)),
    )


def test_copies_of_a_continuation_see_the_same_cache():
    first, second, third, fourth = continuation_spans(2, 4, 2, copies=2)
    assert (third.cached, fourth.cached) == (first.cached, second.cached)
    assert (third.own, fourth.own) == (((4, 6),), ((6, 8),))


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize("stop", range(1, 13))
def test_a_window_shows_its_sink_and_the_latest_frames(window, sink, stop):
    assert frames_of(Window(window, sink).visible(stop)) == rule(stop, window, sink)


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_the_context_is_what_is_visible_before_the_chunk(window, sink, chunk):
    for start in range(0, 12, chunk):
        seen = frames_of(Window(window, sink).context(start, start + chunk))
        assert seen == [frame for frame in rule(start + chunk, window, sink) if frame < start]


def test_ranges_are_never_empty():
    windows = [Window(window, sink) for window, sink in WINDOWS]
    ranges = [r for w in windows for stop in range(1, 13) for r in (*w.visible(stop), *w.context(stop - 1, stop))]
    assert all(first < stop for first, stop in ranges)


def test_chunks_whose_keys_are_cached_see_them_there():
    assert committed_spans(2, 4, 2, capacity=6) == (Span((0, 2), (), ((0, 4),)), Span((2, 4), (), ((0, 6),)))
    window = Window(3, 1)
    assert committed_spans(3, 1, 1, capacity=6, window=window) == (Span((0, 1), (), ((0, 1), (2, 4))),)


def test_a_full_ring_is_seen_as_a_whole():
    assert committed_spans(7, 1, 1, capacity=3, window=Window(3, 1)) == (Span((0, 1), (), ((0, 3),)),)


def test_an_image_is_a_chunk_of_one_frame():
    assert committed_spans(0, 1, 3, capacity=7) == (Span((0, 1), (), ((0, 1),)),)


def test_without_a_window_nothing_may_be_overwritten():
    with pytest.raises(AssertionError):
        committed_spans(4, 2, 2, capacity=4)

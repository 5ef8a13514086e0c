"""What a chunk may see, as unions of contiguous ranges of latent frames: pure functions.

Chunks are causal: every frame sees its own chunk and chunks before it.  A `Window` cuts what lies further back, except
for the first `sink` frames.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]  # [start, stop) in latent frames


@dataclass(frozen=True)
class Span:
    """Query frames [start, stop) of a pass see ranges of the pass's `own` frames and of slots of its cache."""

    query: Range
    own: tuple[Range, ...]
    cached: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Window:
    """How many latent frames a chunk sees, itself and the `sink` first ones included; None: all."""

    frames: int | None = None
    sink: int = 0

    def visible(self, stop: int) -> tuple[Range, ...]:
        """What of the frames [0, stop) a chunk that ends at `stop` sees, itself included."""
        if self.frames is None or stop <= self.frames:
            return ((0, stop),)
        recent = (stop - (self.frames - self.sink), stop)
        return ((0, self.sink), recent) if self.sink else (recent,)

    def context(self, start: int, stop: int) -> tuple[Range, ...]:
        """What a chunk [start, stop) sees of the frames before it."""
        ranges = ((first, min(last, start)) for first, last in self.visible(stop))
        return tuple((first, last) for first, last in ranges if first < last)


EVERYTHING = Window()


def block_causal_spans(frames: int, chunk: int, window: Window = EVERYTHING) -> tuple[Span, ...]:
    """Every chunk sees itself and the chunks before it, all in one pass."""
    return tuple(Span((i, i + chunk), window.visible(i + chunk)) for i in range(0, frames, chunk))


def teacher_forcing_spans(frames: int, chunk: int, copies: int = 1, window: Window = EVERYTHING) -> tuple[Span, ...]:
    """For [clean; noisy; noisy ...]: clean chunks are causal, a noisy one sees the clean ones before it and itself."""
    spans = block_causal_spans(frames, chunk, window)
    for copy in range(1, copies + 1):
        for i in range(0, frames, chunk):
            own = (copy * frames + i, copy * frames + i + chunk)
            spans += (Span(own, (*window.context(i, i + chunk), own)),)
    return spans


def continuation_spans(
    first: int, frames: int, chunk: int, copies: int = 1, window: Window = EVERYTHING
) -> tuple[Span, ...]:
    """Noisy chunks from frame `first` on see the cached clean chunks before them and themselves, in every copy."""
    spans = []
    for copy in range(copies):
        for i in range(0, frames, chunk):
            own = (copy * frames + i, copy * frames + i + chunk)
            spans.append(Span(own, (own,), window.context(first + i, first + i + chunk)))
    return tuple(spans)


def committed_spans(
    before: int, frames: int, chunk: int, capacity: int, window: Window = EVERYTHING
) -> tuple[Span, ...]:
    """Chunks whose own keys already stand in a cache of `capacity` slots, behind `before` frames.

    Once frames were overwritten, whatever is left in the cache is what may be seen.  The last chunk may be shorter: an
    image is one frame.
    """
    spans = []
    for i in range(0, frames, chunk):
        end = min(i + chunk, frames)
        stop = before + end
        assert stop <= capacity or capacity == window.frames
        cached = window.visible(stop) if stop <= capacity else ((0, capacity),)
        spans.append(Span((i, end), (), cached))
    return tuple(spans)

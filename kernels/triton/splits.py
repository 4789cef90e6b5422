"""Into how many parts grad-weight cuts the tokens, so that all multiprocessors have work until the end.

Programs of one size end together: as many as run at once are a wave, and a wave that is nearly empty takes as long as a
full one. With blocks of 128 at density .1 of 4096 x 4096, 102 programs a part, of which an H100 runs 264 at once, four
parts make two waves of a quarter of the tokens, the second half empty; five make two of a fifth.

What a part costs besides: a program begins (four loads, each of which needs the one before) and stores a float32
partial that is read again, ``8 B^2`` bytes. At 3 TB/s of memory and 450 TFLOP/s, ``2 B^2`` operations a token, that is
as long as 600 tokens, whatever the block; beginning took 2 us or some 200 tokens more.
"""

from __future__ import annotations

_OVERHEAD = 800  # tokens
_LEAST = 512  # tokens a part
_MOST_BYTES = 384 << 20  # of float32 partials


def parts(tokens: int, programs: int, at_once: int, partial: int) -> int:
    """The number of parts that takes the least time by the account above.

    Args:
        tokens: all of them.
        programs: of one part.
        at_once: programs that the GPU runs at a time.
        partial: bytes of one part's float32 partials; all together stay below 384 MiB, one part always may be.
    """
    most = max(1, min(tokens // _LEAST, _MOST_BYTES // max(1, partial)))

    def cost(count: int) -> float:
        waves = -(-programs * count // at_once)
        return waves * tokens / count + _OVERHEAD * max(1.0, programs * count / at_once)

    return min(range(1, most + 1), key=cost)

"""How many tokens a step with prefill takes, given the sizes that steps are padded to."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

# A step with fewer tokens takes about as long: it is bound by reading the weights.
WEIGHT_BOUND_TOKENS = 256
TOLERATED_PADDING = 8  # an eighth of the bucket


def cut_to_bucket(num_decoding: int, num_wanted: int, buckets: Sequence[int]) -> int:
    """`num_wanted` tokens, or down to the bucket below where that costs less.

    A step is padded to the next bucket. If chunks are cut, the rest rides with the next step's
    decoding; what both steps take together decides. `buckets` ascend; the last holds `num_wanted`.
    """
    place = bisect.bisect_left(buckets, num_wanted)
    if not 0 < place < len(buckets) or num_wanted == num_decoding:
        return num_wanted
    above, below = buckets[place], buckets[place - 1]
    if below <= num_decoding or (above - num_wanted) * TOLERATED_PADDING < above:
        return num_wanted
    uncut = _step_cost(above) + (_step_cost(num_decoding) if num_decoding else 0)
    rest = num_decoding + num_wanted - below
    cut = _step_cost(below) + _step_cost(buckets[bisect.bisect_left(buckets, rest)])
    return below if cut < uncut else num_wanted


def _step_cost(num_tokens: int) -> int:
    """What a step takes, in tokens' worth of arithmetic."""
    return max(num_tokens, WEIGHT_BOUND_TOKENS)

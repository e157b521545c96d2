"""Compare the entries of a base with the default configurations on this device."""

from collections.abc import Callable, Sequence

from nemotron.ops.tuning.base import Base
from nemotron.tune.problems import Target
from nemotron.tune.result import Bucket
from nemotron.tune.search import DUEL, Device
from nemotron.tune.timing import TOLERANCE, NotLaunched


def verify(
    targets: Sequence[Target], found: Base, device: Device, say: Callable[[str], None]
) -> list[str]:
    """Time each entry that a target falls into against the default; return complaints."""
    complaints, checked = [], set()
    for target in targets:
        tunable = target.tunable
        try:
            default = device.begin(target)
        except NotLaunched:
            continue
        bucket = Bucket.of(tunable, default)
        for entry in found.entries:
            if not bucket.owns(entry) or id(entry) in checked:
                continue
            checked.add(id(entry))
            if not tunable.accepts(entry.configuration):
                complaints.append(f"{bucket}: the kernel has other parameters now; tune it again")
                continue
            candidate = device.capture(entry.configuration)
            device.time([default, candidate], DUEL)
            spread = max(default.spread_us, candidate.spread_us)
            say(f"{bucket}: {candidate.us:.1f} us, default {default.us:.1f} +- {spread:.1f}")
            if candidate.error > TOLERANCE:
                complaints.append(f"{bucket}: WRONG by {candidate.error:.1e}")
            elif candidate.us - default.us > 2 * spread:
                times = f"{candidate.us:.1f} us against the default's {default.us:.1f}"
                complaints.append(f"{bucket}: SLOWER, {times}")
        device.end()
    rest = len(found.entries) - len(checked)
    if rest:
        say(f"{rest} entries are of other shapes than those given; they were not checked")
    return complaints

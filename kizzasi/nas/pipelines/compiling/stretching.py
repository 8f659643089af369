"""How rotary positions of a document are stretched."""

from __future__ import annotations

from typing import Any

from kizzasi.nas.pipelines.compiling.place import Place
from kizzasi.nas.pipelines.misfits import Findings


def stretched(
    scaling: Any, n_rotated: int, place: Place, path: str, findings: Findings
) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`; None if there is none."""
    if scaling is None:
        return None
    factor = scaling.factor
    if factor is None:
        factor = findings.set(f"{path}.factor", f"{scaling.type!r} needs it", 1.0)
    if scaling.type == "ntk" and n_rotated == 2:
        rule = "ntk leaves the first of all frequencies alone, and 2 rotated entries have no other"
        findings.set(f"{path}.type", rule, "linear")
    found: dict[str, Any] = {"method": scaling.type, "factor": factor}
    trained = scaling.type in ("yarn", "longrope")
    if trained:
        before = scaling.original_context or max(2, round(place.ctx_len / factor))
        found["original_context"] = before
    elif scaling.original_context is not None:
        findings.drop(f"{path}.original_context", f"{scaling.type!r} does not read it")
    longrope = scaling.longrope
    if scaling.type != "longrope":
        if longrope is not None:
            findings.drop(f"{path}.longrope", f"{scaling.type!r} does not read it")
        return found
    n = n_rotated // 2
    found["divisors"] = () if longrope is None else longrope.divisors
    if longrope is None or len(longrope.divisors) != n:
        low = 1.0 if longrope is None or longrope.alpha is None else longrope.alpha
        high = factor if longrope is None or longrope.beta is None else longrope.beta
        ramp = [low * (high / low) ** (i / max(1, n - 1)) for i in range(n)]
        rule = "longrope has a divisor for each pair of rotated entries, and no alpha and beta"
        findings.add(
            f"{path}.longrope",
            rule,
            f"give divisors, {n} numbers",
            (f"{path}.longrope", {"divisors": ramp}),
        )
        found["divisors"] = ramp
    elif longrope.alpha is not None or longrope.beta is not None:
        rule = "its divisors say everything"
        findings.set(f"{path}.longrope", rule, {"divisors": list(longrope.divisors)})
    return found

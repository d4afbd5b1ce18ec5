"""Which encoding of a body suits a client: Accept-Encoding with its weights (RFC 9110, 12.5.3)."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(1024)
def negotiate(accept: bytes | None, offered: tuple[str, ...]) -> str | None:
    """Choose an encoding.

    Args:
        accept: the value of Accept-Encoding, None if there is none.
        offered: encodings there are, the preferred one first.

    Returns:
        The one the client likes best, of equals the first; None to send the body as it is.
    """
    if not accept:
        return None
    weights: dict[str, float] = {}
    for part in accept.decode("latin-1").lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                weight = _weight(value.strip())
        weights[name.removeprefix("x-")] = weight
    others = weights.get("*", 0.0)
    best, best_weight = None, 0.0
    for name in offered:
        weight = weights.get(name, others)
        if weight > best_weight:
            best, best_weight = name, weight
    return None if weights.get("identity", 0.0) > best_weight else best


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0

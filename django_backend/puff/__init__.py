"""What ``puff.contrib.django`` is: Puff's names for this project's Django backends."""

from __future__ import annotations

from typing import Any


def query_and_params(queryset: Any) -> tuple[str, list[Any]]:
    """The SQL of a queryset, with numbered parameters (``$1``), and their values; asks the database nothing.

    Args:
        queryset: of Django's ORM.
    """
    sql, params = queryset.query.sql_with_params()
    # Django writes a percent sign of its own as %%, and parameters as %s.
    parts = sql.split("%s")
    numbered = "".join(f"{part}${number}" for number, part in enumerate(parts[:-1], 1)) + parts[-1]
    return numbered.replace("%%", "%"), list(params)

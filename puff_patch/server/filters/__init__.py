"""What stands between the front and every application: `Filter` is the seam, and each concern has its module.

`puff_patch.server.filters.build` puts them together as the options say.
"""

from puff_patch.server.filters.base import Answer, Encoder, Filter, Filters, Headers, Life, Responder, Scope
from puff_patch.server.filters.compression import CompressionOptions
from puff_patch.server.filters.cors import CorsOptions
from puff_patch.server.filters.static import StaticFiles

__all__ = [
    "Answer",
    "CompressionOptions",
    "CorsOptions",
    "Encoder",
    "Filter",
    "Filters",
    "Headers",
    "Life",
    "Responder",
    "Scope",
    "StaticFiles",
]

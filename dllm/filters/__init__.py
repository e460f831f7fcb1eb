"""Learn2PD filters: `filter` reads and writes them, `training` makes them."""

from dllm.filters.filter import (
    ANCHORED,
    FILTER_FORMAT,
    ConfidenceFilter,
    Filter,
    FilterCard,
    FilterNetwork,
    NeighbourFilter,
    bundled_filters,
    filter_files,
    filter_layouts,
    find_filter,
    load_filter,
)

__all__ = [
    "ANCHORED",
    "FILTER_FORMAT",
    "ConfidenceFilter",
    "Filter",
    "FilterCard",
    "FilterNetwork",
    "NeighbourFilter",
    "bundled_filters",
    "filter_files",
    "filter_layouts",
    "find_filter",
    "load_filter",
]

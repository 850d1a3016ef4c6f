"""Pruning: criterion x allocator x schedule x scope x selector, each a dict of functions."""

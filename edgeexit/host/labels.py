"""
Labels that follow channels through a graph, and which operators move them how.

A label tensor has the shape of the value that it belongs to; each element says which channel it
came from, or FROZEN. Unions says which labels must go together. The sets name operators after
what they do to zeros and places; an operator in none of them freezes what it touches.
"""

from collections.abc import Sequence

import torch

FROZEN = 0

Labels = torch.Tensor  # int64, of the value's shape; FROZEN or the label of a channel


class Unions:
    """Labels that must go together; whatever meets FROZEN is frozen."""

    def __init__(self) -> None:
        self._parent = [FROZEN]

    def fresh(self, count: int) -> torch.Tensor:
        """*count* labels that were never used, int64 (count,)."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """The label that stands for all those united with *label*."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def unite(self, one: int, other: int) -> None:
        """From now on the two go together."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def unite_all(self, one: Labels, other: Labels) -> None:
        """Unite the labels of two values of one shape, element by element."""
        pairs = torch.stack([compact(one, other), compact(other, one)]).reshape(2, -1)
        for a, b in torch.unique(pairs, dim=1).T.tolist():
            self.unite(a, b)

    def freeze(self, labels: Labels) -> None:
        """None of *labels* can ever be removed."""
        for label in torch.unique(compact(labels, labels)).tolist():
            self.unite(label, FROZEN)


def compact(labels: Labels, beside: Labels) -> Labels:
    """*labels* without the axes along which both are only repeated (stride 0)."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0 == beside.stride(axis):
            labels, beside = labels.narrow(axis, 0, 1), beside.narrow(axis, 0, 1)
    return labels


def along_axis(labels: Labels, axis: int) -> Labels | None:
    """The labels (C,) along *axis* if they are the same at all other positions, else None."""
    moved = labels.movedim(axis, 0)
    small = compact(moved, moved)
    flat = small.reshape(small.shape[0], -1)
    if not bool((flat == flat[:, :1]).all()):
        return None
    return flat[:, 0].expand(moved.shape[0])


def spread_over(labels: Labels, shape: Sequence[int], axis: int) -> Labels:
    """Labels (C,) as a value of *shape* whose channels lie on *axis*."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.reshape(view).expand(tuple(shape))


aten = torch.ops.aten
KEEP_ZERO = frozenset(
    {
        aten.relu,
        aten.relu_,
        aten.relu6,
        aten.gelu,
        aten.silu,
        aten.silu_,
        aten.hardswish,
        aten.hardswish_,
        aten.tanh,
        aten.leaky_relu,
        aten.leaky_relu_,
        aten.elu,
        aten.dropout,
        aten.dropout_,
        aten.feature_dropout,
        aten.neg,
        aten.abs,
        aten.clone,
        aten.contiguous,
        aten.detach,
        aten.alias,
        aten.to,
        aten._to_copy,
        aten.lift_fresh_copy,
    }
)
VIEWS = frozenset(
    {
        aten.permute,
        aten.transpose,
        aten.t,
        aten.reshape,
        aten.view,
        aten._unsafe_view,
        aten.flatten,
        aten.unflatten,
        aten.squeeze,
        aten.unsqueeze,
        aten.slice,
        aten.select,
        aten.expand,
        aten.movedim,
        aten.chunk,
        aten.split,
        aten.split_with_sizes,
    }
)
REDUCTIONS = frozenset({aten.mean, aten.sum, aten.amax, aten.amin})
POOLS = frozenset(
    {
        aten.adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d,
        aten.adaptive_max_pool1d,
        aten.adaptive_max_pool2d,
        aten.avg_pool1d,
        aten.avg_pool2d,
        aten.max_pool1d,
        aten.max_pool2d,
        aten.max_pool2d_with_indices,
    }
)
CONVS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
CLAMPS = frozenset({aten.hardtanh, aten.hardtanh_, aten.clamp})
PRODUCTS = frozenset({aten.matmul, aten.bmm, aten.mm})

"""The host side: the only rooms that may import torch, a converter or a quantizer."""

"""Judging a candidate before release: scores through the device's own code, and rules over them."""

"""Packages: the graph exported once, weights swapped in, int8, and everything a device needs."""

"""Signed updates on a device: what may be trusted, where packages lie, how both arrive."""

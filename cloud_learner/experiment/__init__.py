"""Replaying what happened: data files by event time, and worlds that learn in other ways."""

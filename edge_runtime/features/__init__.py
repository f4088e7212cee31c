"""Events to feature values: a declarative spec, bounded time windows, and the one engine.

Pure: no disk, no network, no clock of its own. The learner uses exactly this code.
"""

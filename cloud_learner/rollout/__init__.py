"""Rollout in the cloud: what joined labels say of a canary, and the plans that follow."""

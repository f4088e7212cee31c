"""Headwater in the cloud: joins events with labels, learns, gates, signs and rolls out."""

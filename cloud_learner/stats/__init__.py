"""Pure statistics: when evidence suffices, and how good a set of predictions is."""

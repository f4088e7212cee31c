"""Learning: the family's declaration, rows in memory, replicas of the teacher, the student."""

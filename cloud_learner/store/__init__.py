"""What the learner keeps: archived records, the ingest database, packages, and their lineage."""

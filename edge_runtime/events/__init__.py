"""What a device remembers until the learner holds it: the event log and its uplink."""

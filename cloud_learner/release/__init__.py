"""What makes a release genuine: the keys of each trust domain, and the metadata they sign."""

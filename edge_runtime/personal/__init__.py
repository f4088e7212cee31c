"""What a device knows of the person in front of it, for as long as the session lasts."""

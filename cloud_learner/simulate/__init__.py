"""A simulated world around the real thing: devices as processes, applications that play data."""

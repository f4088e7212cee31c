"""How applications reach a device's runtime: the Unix socket, its frames and its clients."""

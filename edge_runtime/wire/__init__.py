"""What crosses a wire or a disk: typed messages, their bytes, and the subjects they travel on."""

"""What a device does with its families: answers, remembers, changes what serves, comes back."""

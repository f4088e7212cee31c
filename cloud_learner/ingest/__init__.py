"""From envelopes on the broker to training examples: consume once, join labels, cap, batch."""

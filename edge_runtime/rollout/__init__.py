"""Which release runs where: the plan that all devices read, and the agent that follows it."""

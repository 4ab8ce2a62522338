"""Which providers can serve an op on this machine, and which one does."""

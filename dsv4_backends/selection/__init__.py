"""Who can serve an op on this machine, and who does: capability, machine, policy, plugins, libraries, the choice."""

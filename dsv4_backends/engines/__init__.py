"""Where engines meet the ops: one module for each engine, imported by those who use it."""

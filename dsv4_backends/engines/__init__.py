"""Engines that reach the ops through their own door. Importing this package imports no engine and no torch."""

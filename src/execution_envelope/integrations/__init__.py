"""Integrations: one file for each way a Python backend runs work."""

"""Marlin inside other projects. Each module imports its own host; register.py alone is imported by
the package itself, and waits until its host is."""

"""Marlin inside other projects. Each module imports its own host; nothing here is imported by the
package itself."""

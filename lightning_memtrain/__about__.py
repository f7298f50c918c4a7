"""Package version, read by the build and by the report's environment section."""

__version__ = "0.1.0.dev0"

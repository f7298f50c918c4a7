"""Where a memory report goes: terminal, JSON and HTML files, loggers."""

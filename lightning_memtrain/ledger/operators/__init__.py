"""What one operator needs, measured or computed before it runs: workspace, time, the bytes of its results."""

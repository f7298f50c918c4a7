"""What no device has tried yet; it may change or go."""

"""What a device is, and what memory it has."""

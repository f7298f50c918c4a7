"""Which line of the user's code has made the storages that are live at the peak."""

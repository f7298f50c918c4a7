"""The processes of a study, and how long they will still take."""

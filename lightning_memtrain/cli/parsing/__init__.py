"""What the command line consists of: commands and their options."""

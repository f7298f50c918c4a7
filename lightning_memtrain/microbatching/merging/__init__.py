"""How what chunks log, return and give to metrics becomes that of their whole batch."""

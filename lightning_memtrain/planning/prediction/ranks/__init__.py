"""What one rank of several needs: the first of them runs alone, and hears itself from all others."""

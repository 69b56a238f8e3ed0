"""Is this project right, and as fast as predicted, on this machine's GPU? Steps that find out."""

"""Which ops run, in which order, and which waits for which?"""

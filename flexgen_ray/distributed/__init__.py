"""How do stages run on a cluster? The only package that imports Ray."""

"""Stages on a Ray cluster: this is the only package that imports Ray."""

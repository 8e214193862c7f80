"""Stubs generated from protos/deltamux/v1 by `make protos`; never edited by hand."""

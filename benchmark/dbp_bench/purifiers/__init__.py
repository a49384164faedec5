"""Purifiers: samplers that read like their papers, and the controls that bound them."""

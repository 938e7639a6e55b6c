"""Simulated disk, object store and catalog, fault plans and conformance suites: public test tools."""

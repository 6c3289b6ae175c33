"""Durable state: records, the Store protocol, its SQL and in-memory implementations, and blobs."""

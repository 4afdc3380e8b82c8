"""Producers and consumers around the store: each one leases what is ready, computes, appends columns and acks."""

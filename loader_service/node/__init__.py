"""One machine of the pool: a dispatcher that leases slices to its workers."""

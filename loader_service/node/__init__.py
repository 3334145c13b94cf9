"""One machine of the pool: a front process that leases slices to its workers."""

"""Opening a store and reading from it: memory-mapped chunks, decoded copies of remote ones, batches."""

"""SAEBench's other evaluations, from probe stores."""

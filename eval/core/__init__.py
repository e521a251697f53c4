"""SAEBench's core evaluation, and hsae's own measures of reconstruction beside it."""

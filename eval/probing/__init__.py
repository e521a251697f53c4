"""SAEBench's probing evaluations: sparse probing, SCR, TPP and absorption."""

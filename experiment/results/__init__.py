"""Results of runs: tables in the run folder, how they are read again, comparisons of runs."""

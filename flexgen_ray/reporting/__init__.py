"""Progress and reports: everything that a run, a plan or a benchmark prints or draws."""

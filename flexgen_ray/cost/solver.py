"""Linear programs, solved by HiGHS. Knows numbers; not what they mean."""

from __future__ import annotations

import os
import sys
from functools import cache

import highspy
import numpy as np

# A linear function of the variables: a coefficient for each, and a constant at the end.
Linear = np.ndarray
Row = tuple[Linear, float, float]  # that lies between these two


def minimise(aim: Linear, rows: list[Row], low: Linear, high: Linear) -> Linear | None:
    """The variables' values, each between its `low` and `high`, where `aim` is least, and a one for
    the constant; None if no values satisfy all rows."""
    matrix = np.array([row for row, _, _ in rows])
    constants = matrix[:, -1]
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(low), len(rows)
    program.col_cost_ = aim[:-1]
    program.col_lower_, program.col_upper_ = low, high
    program.row_lower_ = np.array([least for _, least, _ in rows]) - constants
    program.row_upper_ = np.array([most for _, _, most in rows]) - constants
    at, columns = np.nonzero(matrix[:, :-1])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.searchsorted(at, np.arange(len(rows) + 1)).astype(np.int32)
    program.a_matrix_.index_ = columns.astype(np.int32)
    program.a_matrix_.value_ = matrix[at, columns]
    solver = _solver()
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return np.append(solver.getSolution().col_value, 1.0)


@cache
def _solver() -> highspy.Highs:
    """HiGHS says its name on standard output, which is for results, when it is first made."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
    return solver

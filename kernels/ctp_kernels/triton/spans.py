"""The solver's sequential loops over inputs: what an input becomes, and what that costs the others of its span.

An output is never split among programs, and a program holds its outputs' part of the span in registers.

C=inputs of a span O=outputs K=candidate grids G=grids
"""

import triton
import triton.language as tl


@triton.jit
def rounded_code(w, scale, zero, max_code):
    # far from the grid it makes no difference how far; near it, adding 1.5 x 2^23 leaves no place for a fraction
    steps = tl.minimum(tl.maximum(tl.div_rn(w, scale), -1024.0), 1024.0)
    nearest = (steps + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(nearest + zero, 0.0), max_code.to(tl.float32))


@triton.jit
def take_span(
    W, U, errors, keep, codes, scales, zeros, group_of,
    outputs, columns, U_stride, max_code,
    C: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    """W, errors, keep, codes (C, O), scales and zeros (G, O), U (C, C), group_of (C,). Grid: (outputs / O,)."""
    at_O = tl.program_id(0) * O + tl.arange(0, O)
    at_C = tl.arange(0, C)
    there_O = at_O < outputs
    there_CO = (at_C < columns)[:, None] & there_O[None, :]
    tile = at_C[:, None].to(tl.int64) * outputs + at_O[None, :]
    W_CO = tl.load(W + tile, mask=there_CO, other=0.0)
    for column in range(columns):
        row = tl.cast(column, tl.int64) * outputs + at_O
        here_C1 = (at_C == column)[:, None]
        w_O = tl.sum(tl.where(here_C1, W_CO, 0.0), 0)
        q_O = w_O
        if keep is not None:
            kept_O = tl.load(keep + row, mask=there_O, other=0) != 0
        if scales is not None:
            grid = at_O
            if group_of is not None:
                grid += tl.load(group_of + column).to(tl.int64) * outputs
            scale_O = tl.load(scales + grid, mask=there_O, other=1.0)
            zero_O = tl.load(zeros + grid, mask=there_O, other=0.0)
            code_O = rounded_code(w_O, scale_O, zero_O, max_code)
            if keep is not None:
                code_O = tl.where(kept_O, code_O, zero_O)
            if codes is not None:
                tl.store(codes + row, code_O.to(tl.uint8), mask=there_O)
            q_O = (code_O - zero_O) * scale_O
        if keep is not None:
            q_O = tl.where(kept_O, q_O, 0.0)
        from_row = U + tl.cast(column, tl.int64) * U_stride
        error_O = tl.div_rn(w_O - q_O, tl.zeros_like(w_O) + tl.load(from_row + column))
        tl.store(errors + row, error_O, mask=there_O)
        U_C = tl.load(from_row + at_C, mask=(at_C > column) & (at_C < columns), other=0.0)
        W_CO = tl.where(here_C1, q_O[None, :], W_CO - U_C[:, None] * error_O[None, :])
    tl.store(W + tile, W_CO, mask=there_CO)


@triton.jit
def improve_span(
    codes, residual, H, scales, zeros, group_of, keep, changes,
    outputs, inputs, groups, first, columns, max_code,
    C: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    """codes, residual, keep (O, I), H (I, I), scales and zeros (O, G), group_of (I,); changes (O, C) of values, whose
    effect on the residual is left to the caller. Grid: (outputs / O,).
    """
    at_O = tl.program_id(0).to(tl.int64) * O + tl.arange(0, O)
    at_C = tl.arange(0, C)
    there_O = at_O < outputs
    of_span_C = at_C < columns
    rows_O = at_O * inputs + first
    residual_OC = tl.load(
        residual + rows_O[:, None] + at_C[None, :], mask=there_O[:, None] & of_span_C[None, :], other=0.0
    )
    for column in range(columns):
        from_row = H + tl.cast(first + column, tl.int64) * inputs + first
        r_O = tl.sum(tl.where((at_C == column)[None, :], residual_OC, 0.0), 1)
        grid = at_O * groups + tl.load(group_of + first + column)
        scale_O = tl.load(scales + grid, mask=there_O, other=1.0)
        zero_O = tl.load(zeros + grid, mask=there_O, other=0.0)
        code_O = tl.load(codes + rows_O + column, mask=there_O, other=0).to(tl.float32)
        step_O = tl.div_rn(r_O, tl.zeros_like(r_O) + tl.load(from_row + column))
        best_O = rounded_code((code_O - zero_O) * scale_O + step_O, scale_O, zero_O, max_code)
        if keep is not None:
            best_O = tl.where(tl.load(keep + rows_O + column, mask=there_O, other=0) != 0, best_O, code_O)
        change_O = (best_O - code_O) * scale_O
        tl.store(codes + rows_O + column, best_O.to(tl.uint8), mask=there_O)
        tl.store(changes + at_O * columns + column, change_O, mask=there_O)
        H_C = tl.load(from_row + at_C, mask=of_span_C, other=0.0)
        residual_OC -= change_O[:, None] * H_C[None, :]


@triton.jit
def round_all(w, scales, zeros, errors, outputs, inputs, max_code, O: tl.constexpr):
    """w (C, O), scales, zeros and errors (K, O). Grid: (outputs / O, K)."""
    at_O = tl.program_id(0) * O + tl.arange(0, O)
    there_O = at_O < outputs
    grid = tl.program_id(1).to(tl.int64) * outputs + at_O
    scale_O = tl.load(scales + grid, mask=there_O, other=1.0)
    zero_O = tl.load(zeros + grid, mask=there_O, other=0.0)
    sum_O = tl.zeros((O,), tl.float32)
    for column in range(inputs):
        w_O = tl.load(w + tl.cast(column, tl.int64) * outputs + at_O, mask=there_O, other=0.0)
        off_O = (rounded_code(w_O, scale_O, zero_O, max_code) - zero_O) * scale_O - w_O
        sum_O += off_O * off_O
    tl.store(errors + grid, sum_O, mask=there_O)

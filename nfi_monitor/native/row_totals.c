/* Measure the rows of one backward pass, and add up their features, in one call: measure/row_plan.py. */
#include "nfi.h"

#include <stdlib.h>
#include <string.h>

static double number(const void *x, int wide, int64_t at)
{
    return wide ? ((const double *)x)[at] : (double)((const float *)x)[at];
}

/* The sum over the rows that count: not a product with counts, in which 0 * NaN is NaN. */
static void add_features(nfi_row_totals_call *call, double *sums)
{
    const size_t bytes = call->feature_wide ? 8 : 4, width = (size_t)call->width;
    for (int64_t row = 0; row < call->rows.rows; row++) {
        const char *of = (const char *)call->features + (size_t)(row * call->feature_stride) * bytes;
        if (row < call->keep) memcpy((char *)call->kept + (size_t)row * width * bytes, of, width * bytes);
        if (number(call->rows.counts, call->rows.wide, row) == 0.0) continue;
        if (call->feature_wide) nfi_in_use->add64(sums, (const double *)of, call->width);
        else nfi_in_use->add32(sums, (const float *)of, call->width);
    }
    for (int64_t j = 0; j < call->width; j++)
        if (call->feature_wide) ((double *)call->feature_sum)[j] = sums[j];
        else ((float *)call->feature_sum)[j] = (float)sums[j];
}

/* Fill what nfi_rows fills, totals, feature_sum and kept. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_row_totals(nfi_row_totals_call *call)
{
    const nfi_rows_call *rows = &call->rows;
    double *sums = NULL;
    if (call->features && !(sums = calloc((size_t)call->width, sizeof(double)))) return 1;
    const int failed = nfi_rows(&call->rows);
    if (!failed) {
        for (int i = 0; i < SUMS; i++) call->totals[i] = number(rows->sums, rows->wide, i);
        for (int i = 0; i < MAXIMA; i++) call->totals[SUMS + i] = number(rows->maxima, rows->wide, i);
        if (sums) add_features(call, sums);
    }
    free(sums);
    return failed;
}

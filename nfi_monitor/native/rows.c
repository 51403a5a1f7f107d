/* Measure the rows of one backward pass: what measure/rows.py computes with torch, in one pass over memory.
 *
 * Sums over classes and rows are in double. What decides about a row (is it live, absorbed, underflowed; which
 * class is the correct one) is computed in the precision in which the torch code computes it, so that both
 * decide alike. native_rows.py names the results, in this order.
 */
#include "rows.h"

#include <stdlib.h>
#include <string.h>

#define FEW 32   /* classes of a row that is searched one by one, and whose other logits are copied side by side */
#define LANES 16 /* of the widest vectors */

/* The largest logit, the first of its class or the first NaN, and the largest of the others. */
static void top_of_few(const void *z, int wide, int64_t classes, row_facts *row)
{
    double most = -INFINITY, second = -INFINITY;
    int64_t at = 0;
    for (int64_t i = 0; i < classes; i++) {
        const double value = element(z, wide, i);
        if (value != value) {
            row->winner = i;
            row->largest = value;
            return;
        }
        if (value > most) {
            second = most;
            most = value;
            at = i;
        } else if (value > second) second = value;
    }
    row->winner = at;
    row->largest = most;
    row->runner_up = second;
}

/* nfi_find_top of a row of few classes. The other logits are filled up to whole vectors with -inf, which adds
 * nothing: the sum has the runner-up's 1, and e^-87 or less is lost beside it. */
static void find_top_of_few(const scratch *s, row_facts *row)
{
    union { float narrow[FEW + LANES]; double wide[FEW + LANES]; } rest;
    const int wide = s->call->wide;
    row->runner_up = row->log_rest = -INFINITY;
    top_of_few(s->z, wide, s->call->classes, row);
    if (!isfinite(row->largest)) row->runner_up = -INFINITY;
    if (row->runner_up == -INFINITY) return;
    const int64_t others = s->call->classes - 1, padded = (others + LANES - 1) / LANES * LANES;
    const size_t size = wide ? 8 : 4, before = (size_t)row->winner * size;
    memcpy(&rest, s->z, before);
    memcpy((char *)&rest + before, (const char *)s->z + before + size, (size_t)others * size - before);
    for (int64_t i = others; i < padded; i++)
        if (wide) rest.wide[i] = -INFINITY;
        else rest.narrow[i] = -INFINITY;
    const double shift = row->runner_up;
    const double sum = wide ? s->use->exp_sum64(rest.wide, padded, shift)
                            : s->use->exp_sum32(rest.narrow, padded, (float)shift);
    row->log_rest = log(sum) + (shift - row->largest);
}

void nfi_find_top(const scratch *s, row_facts *row)
{
    const void *z = s->z;
    const int64_t classes = s->call->classes;
    const int wide = s->call->wide;
    int nan = 0;
    if (classes <= FEW) {
        find_top_of_few(s, row);
        return;
    }
    const double most = high(s, z, 0, classes, &nan);
    row->winner = first_of(s, z, most, nan);
    row->largest = element(z, wide, row->winner);
    row->runner_up = row->log_rest = -INFINITY;
    if (!isfinite(row->largest)) return;
    const int64_t after = row->winner + 1;
    const double left = high(s, z, 0, row->winner, &nan), right = high(s, z, after, classes, &nan);
    const double shift = row->runner_up = left > right ? left : right;
    double sum = 0.0;
    if (shift == -INFINITY) return;
    if (wide) {
        sum = s->use->exp_sum64(z, row->winner, shift);
        sum += s->use->exp_sum64((const double *)z + after, classes - after, shift);
    } else {
        sum = s->use->exp_sum32(z, row->winner, (float)shift);
        sum += s->use->exp_sum32((const float *)z + after, classes - after, (float)shift);
    }
    row->log_rest = log(sum) + (row->runner_up - row->largest);
}

double nfi_scan_gradient(const scratch *s, gradient_facts *of)
{
    const nfi_rows_call *call = s->call;
    double most = -INFINITY;
    for (int64_t i = 0; i < call->rows; i++) {
        const void *g = load(s, s->memory[1], call->grad, call->grad_dtype, call->grad_strides, i, 1.0);
        const nfi_scan found = scan(s, g);
        of[i].signed_sum = rounded(found.sum, s->grad_wide);
        of[i].absolute = rounded(found.absolute, s->grad_wide);
        of[i].lowest = first_of(s, g, found.low, found.nan);
        of[i].low = element(g, call->wide, of[i].lowest);
        const double size = isfinite(of[i].low) ? -of[i].low : 0.0;
        if (size > most) most = size;
    }
    const double scale = to_dtype(call->facts[SCALE], call->grad_dtype);
    return times(call->thresholds[MISCLASSIFIED], most > scale ? most : scale, call->grad_dtype);
}

void nfi_find_kind(const scratch *s, int64_t at, const gradient_facts *g, double least, row_facts *row)
{
    const nfi_rows_call *call = s->call;
    row->signed_sum = g->signed_sum;
    row->absolute = g->absolute;
    const double tiny = s->grad_wide ? 0x1p-1074 : 0x1p-149;
    row->violation = fabs(row->signed_sum) / (row->absolute > tiny ? row->absolute : tiny);
    if (row->violation > 1.0) row->violation = 1.0;
    row->finite = isfinite(rounded(row->absolute + row->largest, call->wide));
    row->live = row->absolute > 0.0 && row->finite;
    row->silent = row->absolute == 0.0 && row->finite;

    const double of_winner = gradient_at(call, at, row->winner), low = g->low;
    const double size = isfinite(low) ? -low : 0.0;
    const int outweighs = low < 0.0 && -low >= times(0.75, of_winner, call->grad_dtype);
    const int large = g->lowest == row->winner || size >= least;
    row->target = outweighs && large ? g->lowest : row->winner;
    row->own = row->target == row->winner ? of_winner : low;
}

/* The k-th smallest of x [n], k from 0. Reorders x. */
static double select_kth(double *x, int64_t n, int64_t k)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        double pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] < pivot) i++;
            while (x[j] > pivot) j--;
            if (i <= j) {
                double swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return x[k];
}

double nfi_median(double *x, int64_t n)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (x[i] == x[i]) x[kept++] = x[i];
    return kept ? select_kth(x, kept, (kept - 1) / 2) : NAN;
}

static void put(void *to, int wide, int64_t at, double value)
{
    if (wide) ((double *)to)[at] = value;
    else ((float *)to)[at] = (float)value;
}

typedef struct {
    double *margins, *heaviest;
    gradient_facts *of;
    looked_at *seen;
} per_row;

static int allocate(const nfi_rows_call *call, scratch *s, per_row *memory)
{
    const size_t row = (((size_t)call->classes * (call->wide ? 8 : 4)) + 63) / 64 * 64;
    const size_t rows = (size_t)call->rows;
    s->memory[0] = malloc(2 * row);
    s->memory[1] = s->memory[0] ? (char *)s->memory[0] + row : NULL;
    memory->margins = malloc(rows * sizeof(double));
    memory->of = malloc(rows * sizeof(gradient_facts));
    memory->seen = call->look ? calloc(rows, sizeof(looked_at)) : NULL;
    memory->heaviest = call->look ? calloc((size_t)call->classes, sizeof(double)) : NULL;
    return s->memory[0] && memory->margins && memory->of && (!call->look || (memory->seen && memory->heaviest));
}

/* ln of what the probability of a class is multiplied by in the gradient: absorption.underflowed_rows. */
static double log_factor(const nfi_rows_call *call)
{
    const double most = rounded(-log((double)(call->total > 1 ? call->total : 1)), call->wide);
    const double known = call->facts[SCALE] > 0.0 ? rounded(log(call->facts[SCALE]), call->wide) : most;
    return known < most ? known : most;
}

/* Add what a row that counts is worth. Returns its margin. */
static double add_counted(const row_facts *row, double residual, int wide, double *sums, double *maxima)
{
    const double over = exp(row->log_rest);
    if (row->live) {
        sums[VIOLATION] += row->violation;
        sums[SIGNED] += row->signed_sum;
        sums[ABSOLUTE] += row->absolute;
        sums[RESIDUAL_MASS] += residual;
        if (row->violation > maxima[VIOLATION_MAX]) maxima[VIOLATION_MAX] = row->violation;
    }
    sums[MAX_PROBABILITY] += 1.0 / (1.0 + over);
    sums[HEAD_LOSS] += (row->largest - row->target_logit) + log1p(over);
    sums[COUNTED] += 1.0;
    const double against = row->target == row->winner ? row->runner_up : row->largest;
    const double margin = rounded(row->target_logit - against, wide);
    if (-margin > maxima[NEGATIVE_MARGIN]) maxima[NEGATIVE_MARGIN] = -margin;
    return margin;
}

/* Add one row to the sums and maxima. Returns its margin, NaN if the row does not count. */
static double add_row(scratch *s, int64_t at, const gradient_facts *g, double least, double factor,
                      double *sums, double *maxima, looked_at *seen)
{
    const nfi_rows_call *call = s->call;
    const int wide = call->wide;
    row_facts row;
    s->z = load(s, s->memory[0], call->logits, call->logit_dtype, call->logit_strides, at, call->facts[SLOPE]);
    nfi_find_top(s, &row);
    nfi_find_kind(s, at, g, least, &row);
    row.target_logit = element(s->z, wide, row.target);
    const double rival = rounded(row.runner_up - row.largest, wide);
    const int underflowed = row.silent && rounded(rival + factor, wide) < call->facts[LEVEL];
    const int counts = row.live || underflowed, absorbed = row.live && row.own == 0.0;
    call->winner[at] = row.winner;
    put(call->counts, wide, at, counts);
    put(call->absorbed, wide, at, absorbed);
    sums[LIVE] += row.live;
    sums[ABSORBED] += absorbed;
    sums[ABOVE_FLOOR] += row.live && rounded(row.violation, s->grad_wide) > call->facts[FLOOR];
    sums[UNDERFLOWED] += underflowed;
    sums[SILENT] += row.silent;
    sums[FINITE] += row.finite;
    if (!counts) return NAN;
    const double residual = nfi_residual(&row);
    const double margin = add_counted(&row, residual, wide, sums, maxima);
    if (seen) sums[MEAN_LOGIT] += nfi_look_at_row(s, at, g->low, &row, residual, seen);
    return margin;
}

static void add_rows(nfi_rows_call *call, scratch *s, const per_row *memory)
{
    double sums[SUMS] = { 0.0 }, maxima[MAXIMA] = { 0.0, -INFINITY };
    const double least = nfi_scan_gradient(s, memory->of), factor = log_factor(call);
    for (int64_t i = 0; i < call->rows; i++)
        memory->margins[i] = add_row(s, i, &memory->of[i], least, factor, sums, maxima,
                                     memory->seen ? &memory->seen[i] : NULL);
    if (call->look) nfi_judge_loss(call, memory->seen, memory->heaviest, sums);
    else
        for (int i = UNEXPLAINED; i <= MEAN_LOGIT; i++) sums[i] = NAN;
    double middle = nfi_median(memory->margins, call->rows);
    const double most = call->wide ? 1.7976931348623157e308 : 3.4028234663852886e38;
    middle = middle != middle ? 0.0 : middle > most ? most : middle < -most ? -most : middle;
    sums[ROWS] = (double)call->total;
    sums[SAMPLED] = (double)call->rows;
    sums[MEDIAN_ROWS] = middle * sums[COUNTED];
    maxima[EPSILON] = call->facts[EPS];
    maxima[LOGIT_SCALE] = call->facts[SLOPE];
    maxima[OTHER_MAX] = call->facts[OTHER];
    maxima[UNEVEN_MAX] = call->facts[UNEVEN];
    for (int i = 0; i < SUMS; i++) put(call->sums, call->wide, i, sums[i]);
    for (int i = 0; i < MAXIMA; i++) put(call->maxima, call->wide, i, maxima[i]);
}

/* Fill sums, maxima, counts, absorbed and winner. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_rows(nfi_rows_call *call)
{
    scratch s = { call, nfi_in_use, call->grad_dtype == NFI_FLOAT64, NULL, { NULL, NULL } };
    per_row memory = { NULL, NULL, NULL, NULL };
    const int have = allocate(call, &s, &memory);
    if (have) add_rows(call, &s, &memory);
    free(s.memory[0]);
    free(memory.margins);
    free(memory.heaviest);
    free(memory.of);
    free(memory.seen);
    return have ? 0 : 1;
}

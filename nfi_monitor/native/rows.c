/* Measure the rows of one backward pass: what measure/rows.py computes with torch, in one pass over memory.
 *
 * Sums over classes and rows are in double. What decides about a row (is it live, absorbed, underflowed; which
 * class is the correct one) is computed in the precision in which the torch code computes it, so that both
 * decide alike. ROW_SUMS and ROW_MAXIMA in library.py name the results, in this order.
 */
#include "nfi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One row, with the numbers that decide. */
typedef struct {
    double signed_sum, absolute, violation;
    double largest, runner_up, log_rest;
    double target_logit, own, of_winner;
    int64_t winner, target;
    int live, silent, finite;
} row_facts;

typedef struct {
    const nfi_rows_call *call;
    const nfi_kernels *use;
    int grad_wide;   /* the gradient is float64 */
    const void *z, *g; /* the row: logits and gradient [classes], double if call->wide, else float */
    void *memory[2];   /* where a row is converted */
} scratch;

static double rounded(double x, int wide) { return wide ? x : (double)(float)x; }

static double element(const void *row, int wide, int64_t at)
{
    return wide ? ((const double *)row)[at] : (double)((const float *)row)[at];
}

/* Return a row of a tensor as double or float, as call->wide says: in place, or copied to memory. */
static const void *load(const scratch *s, void *memory, const void *from, int dtype, const int64_t *strides,
                        int64_t row, double factor)
{
    static const int size[] = { 4, 8, 2, 2 };
    const char *start = (const char *)from + row * strides[0] * size[dtype];
    const int wide = s->call->wide;
    if (factor == 1.0 && strides[1] == 1 && dtype == (wide ? NFI_FLOAT64 : NFI_FLOAT32)) return start;
    if (wide) s->use->load64(memory, start, dtype, strides[1], s->call->classes, factor);
    else s->use->load32(memory, start, dtype, strides[1], s->call->classes, (float)factor);
    return memory;
}

static nfi_scan scan(const scratch *s, const void *row)
{
    return s->call->wide ? s->use->scan64(row, s->call->classes) : s->use->scan32(row, s->call->classes);
}

/* The largest of the classes from ... end - 1 that is no NaN. */
static double high(const scratch *s, const void *row, int64_t from, int64_t end, int *nan)
{
    return s->call->wide ? s->use->high64((const double *)row + from, end - from, nan)
                         : (double)s->use->high32((const float *)row + from, end - from, nan);
}

/* The first class with this value; with nan, the first that is NaN. */
static int64_t first_of(const scratch *s, const void *row, double value, int nan)
{
    return s->call->wide ? s->use->first64(row, s->call->classes, value, nan)
                         : s->use->first32(row, s->call->classes, (float)value, nan);
}

static double to_bfloat16(double x)
{
    union { float f; uint32_t u; } as = { (float)x };
    if (x != x) return x;
    as.u += 0x7fffu + ((as.u >> 16) & 1u);
    as.u &= 0xffff0000u;
    return as.f;
}

static double to_float16(double x)
{
    double size = fabs(x);
    if (!(size < 65520.0)) return x != x ? x : copysign(INFINITY, x);
    int exponent;
    frexp(size, &exponent);
    if (exponent < -13) exponent = -13; /* subnormals have a fixed step */
    double step = ldexp(1.0, exponent - 11);
    return copysign(nearbyint(size / step) * step, x);
}

/* 0.75 x, rounded to the gradient's dtype as torch rounds it. */
static double three_quarters(double x, int dtype)
{
    if (dtype == NFI_FLOAT64) return 0.75 * x;
    double product = (double)(0.75f * (float)x);
    return dtype == NFI_BFLOAT16 ? to_bfloat16(product) : dtype == NFI_FLOAT16 ? to_float16(product) : product;
}

/* The largest logit, its class, the second largest, ln of the rest over the largest: margins.top_logits. */
static void find_top(const scratch *s, const void *z, row_facts *row)
{
    const int64_t classes = s->call->classes;
    const int wide = s->call->wide;
    int nan = 0;
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

/* The gradient's sums, the correct class, and the kind of row. find_top must have been called. */
static void find_kind(const scratch *s, row_facts *row)
{
    const nfi_rows_call *call = s->call;
    nfi_scan g = scan(s, s->g);
    row->signed_sum = rounded(g.sum, s->grad_wide);
    row->absolute = rounded(g.absolute, s->grad_wide);
    const double tiny = s->grad_wide ? 0x1p-1074 : 0x1p-149;
    row->violation = fabs(row->signed_sum) / (row->absolute > tiny ? row->absolute : tiny);
    if (row->violation > 1.0) row->violation = 1.0;
    row->finite = isfinite(rounded(row->absolute + row->largest, call->wide));
    row->live = row->absolute > 0.0 && row->finite;
    row->silent = row->absolute == 0.0 && row->finite;

    const int64_t lowest = first_of(s, s->g, g.low, g.nan);
    const double low = element(s->g, call->wide, lowest);
    row->of_winner = element(s->g, call->wide, row->winner);
    row->target = row->winner;
    if (low < 0.0 && -low >= three_quarters(row->of_winner, call->grad_dtype)) row->target = lowest;
    row->own = element(s->g, call->wide, row->target);
}

static double residual_of(const row_facts *row)
{
    double loss = (row->largest - row->target_logit) + log1p(exp(row->log_rest));
    return -expm1(-loss);
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

/* What the second pass over the rows needs, which knows the scale of the gradients. */
typedef struct {
    double violation, residual, of_head, absolute, largest;
} looked_at;

/* A look: what shows the kind of loss in one live or counted row. */
static void look_at_row(scratch *s, int64_t at, const row_facts *row, int counts, double residual,
                        looked_at *seen, double *sums)
{
    const nfi_rows_call *call = s->call;
    const double slope = call->facts[SLOPE];
    const int wide = call->wide;
    int64_t negatives = 0, masked = 0;
    double sum = 0.0;
    for (int64_t k = 0; k < call->classes; k++) negatives += element(s->g, wide, k) < 0.0;
    sums[SOFT] += row->live && negatives > 1;
    if (slope != 1.0)
        s->z = load(s, s->memory[0], call->logits, call->logit_dtype, call->logit_strides, at, 1.0);
    for (int64_t k = 0; k < call->classes; k++) {
        double z = element(s->z, wide, k);
        if (isfinite(z)) sum += z;
        else masked++;
    }
    if (counts) sums[MEAN_LOGIT] += sum / (double)(call->classes - masked) * slope;
    looked_at of = { row->violation, residual, residual, row->live ? row->absolute : 0.0, row->largest };
    if (slope != 1.0) {
        row_facts head = *row;
        find_top(s, s->z, &head);
        head.target_logit = element(s->z, wide, row->target);
        of.of_head = residual_of(&head);
    }
    *seen = of;
}

/* The rows that show the kind of loss: rows.unexplained_rows. Returns the scale of the gradients. */
static double judge_loss(const nfi_rows_call *call, const looked_at *seen, const unsigned char *live,
                         double *sums)
{
    const double *at = call->thresholds, eps = call->facts[EPS];
    double scale = 0.0;
    for (int64_t i = 0; i < call->rows; i++) {
        if (!live[i] || !(seen[i].residual > at[UNSURE])) continue;
        double shown = seen[i].absolute / (2.0 * seen[i].residual);
        if (shown > scale) scale = shown;
    }
    scale = rounded(scale, call->wide);
    if (call->facts[SCALE] > scale) scale = call->facts[SCALE];
    const double tiny = call->wide ? 0x1p-1022 : 0x1p-126;
    const double clearly = at[CLEARLY] * eps < at[RESOLVED] ? at[CLEARLY] * eps : at[RESOLVED];
    for (int64_t i = 0; i < call->rows; i++) {
        if (!live[i]) continue;
        double residual = seen[i].residual, of_gradient = seen[i].absolute / (2.0 * scale);
        if (scale > 0.0 && (of_gradient < residual || of_gradient > at[MISMATCH] * residual))
            residual = of_gradient;
        double ulps = at[SAFETY] * eps * (1.0 + fabs(seen[i].largest)) + call->summation_error;
        sums[UNEXPLAINED] += seen[i].violation > ulps / (residual > tiny ? residual : tiny) + ulps;
        sums[CONTRADICTED] +=
            scale > 0.0 && of_gradient > clearly && of_gradient > at[MISMATCH] * seen[i].of_head;
        sums[UNSURE_ROWS] += residual > at[UNSURE];
    }
    return scale;
}

static int allocate(const nfi_rows_call *call, scratch *s, double **margins, looked_at **seen,
                    unsigned char **live)
{
    const size_t row = (((size_t)call->classes * (call->wide ? 8 : 4)) + 63) / 64 * 64;
    s->memory[0] = malloc(2 * row);
    s->memory[1] = s->memory[0] ? (char *)s->memory[0] + row : NULL;
    *margins = malloc((size_t)call->rows * sizeof(double));
    *seen = call->look ? malloc((size_t)call->rows * sizeof(looked_at)) : NULL;
    *live = call->look ? malloc((size_t)call->rows) : NULL;
    return s->memory[0] && *margins && (!call->look || (*seen && *live));
}

/* Add one row to the sums and maxima. Returns its margin, NaN if the row does not count. */
static double add_row(scratch *s, int64_t at, double log_total, double *sums, double *maxima,
                      looked_at *seen, unsigned char *live)
{
    const nfi_rows_call *call = s->call;
    const int wide = call->wide;
    row_facts row;
    s->z = load(s, s->memory[0], call->logits, call->logit_dtype, call->logit_strides, at, call->facts[SLOPE]);
    s->g = load(s, s->memory[1], call->grad, call->grad_dtype, call->grad_strides, at, 1.0);
    find_top(s, s->z, &row);
    find_kind(s, &row);
    row.target_logit = element(s->z, wide, row.target);
    const double rival = rounded(row.runner_up - row.largest, wide);
    const int underflowed = row.silent && rounded(rival - rounded(log_total, wide), wide) < call->facts[LEVEL];
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
    if (live) live[at] = (unsigned char)row.live;
    if (!counts) return NAN;

    const double over = exp(row.log_rest), loss = (row.largest - row.target_logit) + log1p(over);
    const double residual = -expm1(-loss);
    if (row.live) {
        sums[VIOLATION] += row.violation;
        sums[SIGNED] += row.signed_sum;
        sums[ABSOLUTE] += row.absolute;
        sums[RESIDUAL_MASS] += residual;
        if (row.violation > maxima[VIOLATION_MAX]) maxima[VIOLATION_MAX] = row.violation;
    }
    sums[MAX_PROBABILITY] += 1.0 / (1.0 + over);
    sums[HEAD_LOSS] += loss;
    sums[COUNTED] += 1.0;
    const double against = row.target == row.winner ? row.runner_up : row.largest;
    const double margin = rounded(row.target_logit - against, wide);
    if (-margin > maxima[NEGATIVE_MARGIN]) maxima[NEGATIVE_MARGIN] = -margin;
    if (call->look) look_at_row(s, at, &row, counts, residual, &seen[at], sums);
    return margin;
}

/* Fill sums, maxima, counts, absorbed and winner. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_rows(nfi_rows_call *call)
{
    scratch s = { call, nfi_in_use, call->grad_dtype == NFI_FLOAT64, NULL, NULL, { NULL, NULL } };
    double *margins = NULL, sums[SUMS] = { 0.0 };
    double maxima[MAXIMA] = { 0.0, -INFINITY, call->facts[EPS], call->facts[SLOPE] };
    looked_at *seen = NULL;
    unsigned char *live = NULL;
    const int have = allocate(call, &s, &margins, &seen, &live);
    if (have) {
        const double log_total = log((double)(call->total > 1 ? call->total : 1));
        for (int64_t i = 0; i < call->rows; i++)
            margins[i] = add_row(&s, i, log_total, sums, maxima, seen, live);
        if (call->look)
            call->facts[SCALE] = judge_loss(call, seen, live, sums);
        else
            for (int i = UNEXPLAINED; i <= MEAN_LOGIT; i++) sums[i] = NAN;
        double middle = nfi_median(margins, call->rows);
        const double most = call->wide ? 1.7976931348623157e308 : 3.4028234663852886e38;
        middle = middle != middle ? 0.0 : middle > most ? most : middle < -most ? -most : middle;
        sums[ROWS] = (double)call->total;
        sums[SAMPLED] = (double)call->rows;
        sums[MEDIAN_ROWS] = middle * sums[COUNTED];
        for (int i = 0; i < SUMS; i++) put(call->sums, call->wide, i, sums[i]);
        for (int i = 0; i < MAXIMA; i++) put(call->maxima, call->wide, i, maxima[i]);
    }
    free(s.memory[0]);
    free(margins);
    free(seen);
    free(live);
    return have ? 0 : 1;
}

/* --- the precision and the factor that a gradient shows ------------------------------------------------- */

/* Bits of the precisions that hold all finite entries: 1 float32, 2 float16, 4 bfloat16; 8: some is not 0. */
NFI_PUBLIC int nfi_shown(const nfi_rows_call *call)
{
    const nfi_kernels *use = nfi_in_use;
    const int wide = call->grad_dtype == NFI_FLOAT64;
    static const int size[] = { 4, 8, 2, 2 };
    int fits = wide ? 7 : 6, nonzero = 0;
    double part[64];
    for (int64_t i = 0; i < call->rows; i++) {
        const char *row = (const char *)call->grad + i * call->grad_strides[0] * size[call->grad_dtype];
        for (int64_t k = 0; k < call->classes; k += 64) {
            const int64_t n = call->classes - k < 64 ? call->classes - k : 64;
            use->load64(part, row + k * call->grad_strides[1] * size[call->grad_dtype], call->grad_dtype,
                        call->grad_strides[1], n, 1.0);
            for (int64_t j = 0; j < n; j++) {
                const double x = part[j];
                if (x == 0.0 || !isfinite(x)) continue;
                nonzero = 8;
                if (fits & 1 && (double)(float)x != x) fits &= ~1;
                if (fits & 2 && to_float16(x) != x) fits &= ~2;
                if (fits & 4 && to_bfloat16(x) != x) fits &= ~4;
            }
            if (nonzero && !fits) return nonzero;
        }
    }
    return fits | nonzero;
}

typedef struct {
    double slope, noise, deviation;
    int64_t count;
} row_line;

/* The straight line of ln g over z in one row: logit_scale.py. Returns whether the row is usable. */
static int line_of_row(const scratch *s, const row_facts *row, double *log_g, row_line *line)
{
    const nfi_rows_call *call = s->call;
    static const double normal[] = { 0x1p-126, 0x1p-1022, 0x1p-126, 0x1p-14 };
    const double least = normal[call->grad_dtype];
    int64_t count = 0, negatives = 0;
    double sum_z = 0.0, sum_l = 0.0, largest = 0.0, zz = 0.0, zl = 0.0, ll = 0.0;
    const double *z = s->z, *gradient = s->g; /* both rows are in double here */
    for (int64_t k = 0; k < call->classes; k++) {
        const double g = gradient[k];
        negatives += g < 0.0;
        log_g[k] = NAN;
        if (!(g >= least) || !isfinite(z[k]) || k == row->target || k == row->winner) continue;
        log_g[k] = log(g);
        count++;
        sum_z += z[k];
        sum_l += log_g[k];
        if (fabs(z[k]) > largest) largest = fabs(z[k]);
    }
    if (count < 2 || negatives != 1 || !row->live) return 0;
    const double n = (double)count, mean_z = sum_z / n, mean_l = sum_l / n;
    for (int64_t k = 0; k < call->classes; k++) {
        if (log_g[k] != log_g[k]) continue;
        const double x = z[k] - mean_z, y = log_g[k] - mean_l;
        zz += x * x;
        zl += x * y;
        ll += y * y;
    }
    const double spread = zz / n, both = zl / n, slope = both / spread;
    const double rest = ll / n - slope * both;
    line->slope = slope;
    line->count = count;
    line->noise = 4.0 * call->facts[EPS] * (1.0 + largest * fabs(slope));
    line->deviation = sqrt(spread);
    if (!(line->deviation * slope > 5.0 * line->noise)) return 0;
    line->count = sqrt(rest > 0.0 ? rest : 0.0) < call->thresholds[STRAIGHT] + line->noise ? count : -count;
    return 1;
}

/* What the rows together say: logit_scale.py, from the median of ln s on. */
static double agreed_slope(const nfi_rows_call *call, const row_line *lines, double *logs, int64_t usable,
                           int64_t live)
{
    const double *at = call->thresholds, known = call->facts[SLOPE];
    double same = 0.0, width = 0.0, noise = 0.0, points = 0.0;
    for (int64_t i = 0; i < usable; i++) logs[i] = lines[i].count > 0 ? log(lines[i].slope) : NAN;
    const double middle = nfi_median(logs, usable), found = exp(middle);
    for (int64_t i = 0; i < usable; i++) {
        if (lines[i].count <= 0 || !(fabs(log(lines[i].slope) - middle) < at[SAME])) continue;
        same += 1.0;
        width += lines[i].deviation * found;
        points += (double)lines[i].count;
        if (lines[i].noise > noise) noise = lines[i].noise;
    }
    if (!(same >= at[SURE] * (double)usable && same >= at[FEWEST] * (double)live && same >= 2.0)) return known;
    const int near = found * at[NEAR] >= 1.0 && found <= at[NEAR];
    const int precise = width >= at[SPREAD] * same && noise < at[STRAIGHT];
    const int line = points > 2.0 * same;
    const int believed =
        found * at[NEAR] < 1.0 || (line && (found >= at[STEEP] || (found > at[NEAR] && precise)));
    return near ? 1.0 : believed ? found : known;
}

/* Return the factor between the head's logits and those of the loss; NaN if there is no memory. */
NFI_PUBLIC double nfi_logit_scale(nfi_rows_call *given)
{
    nfi_rows_call as_double = *given;
    as_double.wide = 1; /* rows are loaded into double: ln g needs it */
    nfi_rows_call *call = &as_double;
    scratch s = { call, nfi_in_use, call->grad_dtype == NFI_FLOAT64, NULL, NULL, { NULL, NULL } };
    double *memory = s.memory[0] = malloc(3 * (size_t)call->classes * sizeof(double));
    row_line *lines = malloc((size_t)call->rows * sizeof(row_line));
    double *logs = malloc((size_t)call->rows * sizeof(double)), slope = NAN;
    if (memory && lines && logs) {
        int64_t usable = 0, live = 0;
        s.memory[1] = memory + call->classes;
        for (int64_t i = 0; i < call->rows; i++) {
            row_facts row;
            s.z = load(&s, s.memory[0], call->logits, call->logit_dtype, call->logit_strides, i, 1.0);
            s.g = load(&s, s.memory[1], call->grad, call->grad_dtype, call->grad_strides, i, 1.0);
            int nan = 0;
            const double most = high(&s, s.z, 0, call->classes, &nan);
            row.winner = first_of(&s, s.z, most, nan);
            row.largest = element(s.z, 1, row.winner);
            find_kind(&s, &row);
            row.live = row.live && row.violation < call->thresholds[ZERO_SUM];
            live += row.live;
            usable += line_of_row(&s, &row, memory + 2 * call->classes, &lines[usable]);
        }
        slope = agreed_slope(call, lines, logs, usable, live);
    }
    free(s.memory[0]);
    free(lines);
    free(logs);
    return slope;
}

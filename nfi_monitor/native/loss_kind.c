/* What a look at the rows shows about the loss: measure/loss_kind.py, logit_scale.py, shift_invariance.py and
 * cross_entropy_fit.py.
 */
#include "rows.h"

#include <stdlib.h>

/* Hold the gradient g of a row against p - y: cross_entropy_fit.mismatch. */
static void fit_row(const scratch *s, const void *g, double low, const row_facts *row, looked_at *seen)
{
    const nfi_rows_call *call = s->call;
    const double *at = call->thresholds;
    int nan = 0;
    const double most = high(s, g, 0, call->classes, &nan);
    const double size = most > -low ? most : -low;
    if (!(seen->residual > at[UNSURE] && size > at[CLEAR] * exp(call->facts[LEVEL]))) return;
    double sums[3]; /* of u e, e^2 and u^2: u = g / size, p = e / total */
    if (call->wide) s->use->fit64(s->z, g, call->classes, row->largest, 1.0 / size, sums);
    else s->use->fit32(s->z, g, call->classes, (float)row->largest, (float)(1.0 / size), sums);
    const double total = 1.0 + exp(row->log_rest), chance = exp(row->target_logit - row->largest) / total;
    const double common = sums[0] / total - element(g, call->wide, row->target) / size;
    const double square = sums[1] / (total * total) + 1.0 - 2.0 * chance;
    seen->tells = isfinite(common);
    if (common > 0.0 && common * common > (1.0 - at[TURNED] * at[TURNED]) * square * sums[2])
        seen->weight = size * common / square;
}

double nfi_look_at_row(scratch *s, int64_t at, double low, const row_facts *row, double residual,
                       looked_at *seen)
{
    const nfi_rows_call *call = s->call;
    const double slope = call->facts[SLOPE];
    const int wide = call->wide;
    const void *g = load(s, s->memory[1], call->grad, call->grad_dtype, call->grad_strides, at, 1.0);
    int64_t negatives = 0, masked = 0;
    double sum = 0.0;
    for (int64_t k = 0; k < call->classes; k++) negatives += element(g, wide, k) < 0.0;
    seen->violation = row->violation;
    seen->residual = seen->of_head = residual;
    seen->absolute = row->absolute;
    seen->largest = row->largest;
    seen->target = row->target;
    seen->live = row->live;
    seen->several = negatives > 1;
    if (row->live) fit_row(s, g, low, row, seen);
    if (slope != 1.0) {
        row_facts head = *row;
        s->z = load(s, s->memory[0], call->logits, call->logit_dtype, call->logit_strides, at, 1.0);
        nfi_find_top(s, &head);
        head.target_logit = element(s->z, wide, row->target);
        seen->of_head = nfi_residual(&head);
    }
    for (int64_t k = 0; k < call->classes; k++) {
        double z = element(s->z, wide, k);
        if (isfinite(z)) sum += z;
        else masked++;
    }
    return sum / (double)(call->classes - masked) * slope;
}

/* The scale s of the gradients g = s (p - y), as all rows so far show it. */
static double scale_of(const nfi_rows_call *call, const looked_at *seen)
{
    double scale = 0.0;
    for (int64_t i = 0; i < call->rows; i++) {
        if (!seen[i].live || !(seen[i].residual > call->thresholds[UNSURE])) continue;
        double shown = seen[i].absolute / (2.0 * seen[i].residual);
        if (shown > scale) scale = shown;
    }
    scale = rounded(scale, call->wide);
    return call->facts[SCALE] > scale ? call->facts[SCALE] : scale;
}

/* The shares of rows that no cross-entropy fits, and that weigh less: cross_entropy_fit.mismatch. */
static void judge_fit(nfi_rows_call *call, const looked_at *seen, double *heaviest)
{
    const double lighter = call->thresholds[LIGHTER];
    double tell = 0.0, other = 0.0, uneven = 0.0, most = 0.0;
    for (int64_t i = 0; i < call->rows; i++) {
        const looked_at *row = &seen[i];
        if (!row->tells) continue;
        if (row->weight > heaviest[row->target]) heaviest[row->target] = row->weight;
        if (row->weight > most) most = row->weight;
    }
    for (int64_t i = 0; i < call->rows; i++) {
        const looked_at *row = &seen[i];
        if (!row->tells) continue;
        const int fits = row->weight > 0.0 && row->weight >= lighter * heaviest[row->target];
        tell += 1.0;
        other += !fits;
        uneven += fits && row->weight < lighter * most;
    }
    if (tell == 0.0) return;
    call->facts[OTHER] = rounded(other / tell, call->wide);
    call->facts[UNEVEN] = rounded(uneven / tell, call->wide);
}

void nfi_judge_loss(nfi_rows_call *call, looked_at *seen, double *heaviest, double *sums)
{
    const double *at = call->thresholds, eps = call->facts[EPS];
    const double scale = call->facts[SCALE] = scale_of(call, seen);
    const double tiny = call->wide ? 0x1p-1022 : 0x1p-126;
    const double clearly = at[CLEARLY] * eps < at[RESOLVED] ? at[CLEARLY] * eps : at[RESOLVED];
    const double visible = times(2.0 * at[VISIBLE], scale, call->wide ? NFI_FLOAT64 : NFI_FLOAT32);
    const double shown = rounded(visible, call->grad_dtype == NFI_FLOAT64);
    for (int64_t i = 0; i < call->rows; i++) {
        if (!seen[i].live) continue;
        double residual = seen[i].residual, of_gradient = seen[i].absolute / (2.0 * scale);
        if (scale > 0.0 && (of_gradient < residual || of_gradient > at[MISMATCH] * residual))
            residual = of_gradient;
        double ulps = at[SAFETY] * eps * (1.0 + fabs(seen[i].largest)) + call->summation_error;
        sums[UNEXPLAINED] += seen[i].violation > ulps / (residual > tiny ? residual : tiny) + ulps;
        sums[CONTRADICTED] +=
            scale > 0.0 && of_gradient > clearly && of_gradient > at[MISMATCH] * seen[i].of_head;
        sums[UNSURE_ROWS] += residual > at[UNSURE];
        seen[i].tells &= seen[i].absolute > shown;
        sums[SOFT] += seen[i].several && seen[i].absolute > shown;
    }
    judge_fit(call, seen, heaviest);
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
static int line_of_row(const scratch *s, const double *gradient, const row_facts *row, double *log_g,
                       row_line *line)
{
    const nfi_rows_call *call = s->call;
    static const double normal[] = { 0x1p-126, 0x1p-1022, 0x1p-126, 0x1p-14 };
    const double least = normal[call->grad_dtype];
    int64_t count = 0, negatives = 0;
    double sum_z = 0.0, sum_l = 0.0, largest = 0.0, zz = 0.0, zl = 0.0, ll = 0.0;
    const double *z = s->z; /* both rows are in double here */
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
    scratch s = { call, nfi_in_use, call->grad_dtype == NFI_FLOAT64, NULL, { NULL, NULL } };
    double *memory = s.memory[0] = malloc(3 * (size_t)call->classes * sizeof(double));
    row_line *lines = malloc((size_t)call->rows * sizeof(row_line));
    gradient_facts *of = malloc((size_t)call->rows * sizeof(gradient_facts));
    double *logs = malloc((size_t)call->rows * sizeof(double)), slope = NAN;
    if (memory && lines && of && logs) {
        int64_t usable = 0, live = 0;
        s.memory[1] = memory + call->classes;
        const double least = nfi_scan_gradient(&s, of);
        for (int64_t i = 0; i < call->rows; i++) {
            row_facts row;
            s.z = load(&s, s.memory[0], call->logits, call->logit_dtype, call->logit_strides, i, 1.0);
            const void *g = load(&s, s.memory[1], call->grad, call->grad_dtype, call->grad_strides, i, 1.0);
            int nan = 0;
            const double most = high(&s, s.z, 0, call->classes, &nan);
            row.winner = first_of(&s, s.z, most, nan);
            row.largest = element(s.z, 1, row.winner);
            nfi_find_kind(&s, i, &of[i], least, &row);
            row.live = row.live && row.violation < call->thresholds[ZERO_SUM];
            live += row.live;
            usable += line_of_row(&s, g, &row, memory + 2 * call->classes, &lines[usable]);
        }
        slope = agreed_slope(call, lines, logs, usable, live);
    }
    free(s.memory[0]);
    free(lines);
    free(of);
    free(logs);
    return slope;
}

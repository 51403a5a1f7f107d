/* The mean cross-entropy of a few rows and its gradient, which sums to zero: remedies/few_rows.py. */
#include "nfi.h"

#include <math.h>

#define ROOM 2048 /* logits that are computed together, of whole rows */
#define LOWEST -708.0 /* e^x has all its digits from here on */
#define FEW 24 /* classes up to which starting a loop over vectors takes longer than the loop */
#define MANY 1e250 /* the product of two numbers 1 + ratio below these overflows nowhere */
#define STEEP 1e50
#define LITTLE 0x1p-20 /* below, 1 + ratio would lose the digits of a float32 */

typedef struct {
    const void *logits; /* [classes] */
    void *gradient;     /* [classes], or NULL */
    int64_t classes;
    int wide;           /* both are float64, else float32 */
} one_row;

/* The losses: a sum, and the logarithm of a product. */
typedef struct { double sum, product; } losses;

static double logit(const one_row *row, int64_t k)
{
    return row->wide ? ((const double *)row->logits)[k] : (double)((const float *)row->logits)[k];
}

static one_row row_at(const void *logits, void *gradient, int64_t row, int64_t classes, int wide)
{
    const size_t from = (size_t)(row * classes) * (wide ? 8 : 4);
    one_row found = { (const char *)logits + from, gradient ? (char *)gradient + from : NULL, classes, wide };
    return found;
}

/* Fill differences with z - max z, at least LOWEST; least is the smallest of z - max z.
 * Returns max z, NaN where a logit is NaN or the largest is not finite. */
static double fill(const one_row *row, double *differences, double *least)
{
    double most = -INFINITY, low = INFINITY;
    int nan = 0;
    if (row->classes > FEW) {
        most = row->wide ? nfi_in_use->below64(row->logits, row->classes, LOWEST, differences, least)
                         : nfi_in_use->below32(row->logits, row->classes, LOWEST, differences, least);
        nan = *least != *least;
    } else {
        for (int64_t k = 0; k < row->classes; k++) {
            const double z = differences[k] = logit(row, k);
            most = z > most ? z : most;
            low = z < low ? z : low;
            nan |= z != z;
        }
        for (int64_t k = 0; k < row->classes; k++) {
            const double d = differences[k] - most;
            differences[k] = d < LOWEST ? LOWEST : d;
        }
        *least = low - most;
    }
    return isfinite(most) && !nan ? most : NAN;
}

static double add_up(const double *e, int64_t classes)
{
    if (classes > FEW) return nfi_in_use->total(e, classes);
    double sum = 0.0;
    for (int64_t k = 0; k < classes; k++) sum += e[k];
    return sum;
}

static void put_gradient(const one_row *row, const double *e, double share)
{
    if (row->wide) nfi_in_use->share64(e, row->classes, share, row->gradient);
    else if (row->classes > FEW) nfi_in_use->share32(e, row->classes, share, row->gradient);
    else
        for (int64_t k = 0; k < row->classes; k++) ((float *)row->gradient)[k] = (float)(e[k] * share);
}

/* Add ln(1 + ratio). A logarithm takes as long as the rest of a row of ten classes: of float32 logits, those of
 * several rows are one of their product, which keeps 33 bits of each. */
static void add_loss(losses *to, double ratio, int wide)
{
    if (wide || !(ratio < STEEP)) to->sum += log1p(ratio);
    else if (ratio < LITTLE) to->sum += ratio - 0.5 * ratio * ratio;
    else if ((to->product *= 1.0 + ratio) > MANY) {
        to->sum += log(to->product);
        to->product = 1.0;
    }
}

/* Add the loss of one row, and write its gradient. e: e^(z - most), at least e^LOWEST; least: of z - most;
 * scale: 1 / rows. */
static void finish(const one_row *row, int64_t target, double most, double least, double *e, double scale,
                   losses *to)
{
    const double below = logit(row, target) - most;
    if (least < LOWEST)
        for (int64_t k = 0; k < row->classes; k++)
            if (logit(row, k) - most < LOWEST) e[k] = exp(logit(row, k) - most); /* 0 of a masked class */
    const double own = e[target];
    e[target] = 0.0;
    const double rest = add_up(e, row->classes);
    const double total = rest + own, share = scale / total;
    if (row->gradient) {
        put_gradient(row, e, share);
        if (row->wide) ((double *)row->gradient)[target] = -rest * share;
        else ((float *)row->gradient)[target] = (float)(-rest * share);
    }
    if (below > LOWEST) add_loss(to, rest / own, row->wide);
    else to->sum += log(total) - below;
}

/* Fill loss [] and, unless it is NULL, gradient [rows, classes], of contiguous logits. All is computed in double.
 * Returns 1, without a result, for an index of no class, and for rows whose loss is not finite. */
NFI_PUBLIC int nfi_cross_entropy(const void *logits, const int64_t *target, int64_t rows, int64_t classes, int wide,
                                 void *loss, void *gradient)
{
    double room[ROOM], most[ROOM], least[ROOM];
    losses all = { 0.0, 1.0 };
    if (!logits || !target || classes < 1 || classes > ROOM) return 1;
    const int64_t together = ROOM / classes;
    for (int64_t first = 0; first < rows; first += together) {
        const int64_t count = rows - first < together ? rows - first : together;
        for (int64_t i = 0; i < count; i++) {
            if (target[first + i] < 0 || target[first + i] >= classes) return 1;
            const one_row row = row_at(logits, gradient, first + i, classes, wide);
            most[i] = fill(&row, room + i * classes, least + i);
            if (most[i] != most[i]) return 1;
        }
        nfi_in_use->exps(room, count * classes);
        for (int64_t i = 0; i < count; i++) {
            const one_row row = row_at(logits, gradient, first + i, classes, wide);
            finish(&row, target[first + i], most[i], least[i], room + i * classes, 1.0 / (double)rows, &all);
        }
    }
    const double mean = (all.sum + log(all.product)) / (double)rows;
    if (!isfinite(mean)) return 1;
    if (wide) *(double *)loss = mean;
    else *(float *)loss = (float)mean;
    return 0;
}

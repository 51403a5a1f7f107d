/* What rows.c and loss_kind.c share: one row in its numbers, and how it is read. */
#ifndef NFI_ROWS_H
#define NFI_ROWS_H

#include "nfi.h"

#include <math.h>

/* One row, with the numbers that decide. */
typedef struct {
    double signed_sum, absolute, violation;
    double largest, runner_up, log_rest;
    double target_logit, own;
    int64_t winner, target;
    int live, silent, finite;
} row_facts;

/* What the gradient of one row shows by itself. */
typedef struct {
    double signed_sum, absolute, low;
    int64_t lowest; /* the class of low, the smallest entry; NaN counts as smaller */
} gradient_facts;

/* What one live row shows about the kind of loss. */
typedef struct {
    double violation, residual, of_head, absolute, largest;
    double weight;      /* in a cross-entropy that fits the gradient, else 0 */
    int64_t target;
    int live, tells;    /* whether it may tell if a cross-entropy fits */
    int several;        /* negative entries */
} looked_at;

typedef struct {
    const nfi_rows_call *call;
    const nfi_kernels *use;
    int grad_wide;     /* the gradient is float64 */
    const void *z;     /* the row's logits [classes], double if call->wide, else float */
    void *memory[2];   /* where a row of logits, of the gradient is converted */
} scratch;

static inline double rounded(double x, int wide)
{
    /* Volatile: GCC 12 leaves the conversions away where it rounds two numbers side by side in one vector. */
    volatile float narrow = (float)x;
    return wide ? x : (double)narrow;
}

static inline double element(const void *row, int wide, int64_t at)
{
    return wide ? ((const double *)row)[at] : (double)((const float *)row)[at];
}

/* Return a row of a tensor as double or float, as call->wide says: in place, or copied to memory. */
static inline const void *load(const scratch *s, void *memory, const void *from, int dtype,
                               const int64_t *strides, int64_t row, double factor)
{
    static const int size[] = { 4, 8, 2, 2 };
    const char *start = (const char *)from + row * strides[0] * size[dtype];
    const int wide = s->call->wide;
    if (factor == 1.0 && strides[1] == 1 && dtype == (wide ? NFI_FLOAT64 : NFI_FLOAT32)) return start;
    if (wide) s->use->load64(memory, start, dtype, strides[1], s->call->classes, factor);
    else s->use->load32(memory, start, dtype, strides[1], s->call->classes, (float)factor);
    return memory;
}

static inline nfi_scan scan(const scratch *s, const void *row)
{
    return s->call->wide ? s->use->scan64(row, s->call->classes) : s->use->scan32(row, s->call->classes);
}

/* The largest of the classes from ... end - 1 that is no NaN. */
static inline double high(const scratch *s, const void *row, int64_t from, int64_t end, int *nan)
{
    return s->call->wide ? s->use->high64((const double *)row + from, end - from, nan)
                         : (double)s->use->high32((const float *)row + from, end - from, nan);
}

/* The first class with this value; with nan, the first that is NaN. */
static inline int64_t first_of(const scratch *s, const void *row, double value, int nan)
{
    return s->call->wide ? s->use->first64(row, s->call->classes, value, nan)
                         : s->use->first32(row, s->call->classes, (float)value, nan);
}

static inline double to_bfloat16(double x)
{
    union { float f; uint32_t u; } as = { (float)x };
    if (x != x) return x;
    as.u += 0x7fffu + ((as.u >> 16) & 1u);
    as.u &= 0xffff0000u;
    return as.f;
}

static inline double to_float16(double x)
{
    double size = fabs(x);
    if (!(size < 65520.0)) return x != x ? x : copysign(INFINITY, x);
    int exponent;
    frexp(size, &exponent);
    if (exponent < -13) exponent = -13; /* subnormals have a fixed step */
    double step = ldexp(1.0, exponent - 11);
    return copysign(nearbyint(size / step) * step, x);
}

/* A number, rounded to a dtype. */
static inline double to_dtype(double x, int dtype)
{
    return dtype == NFI_FLOAT64    ? x
           : dtype == NFI_BFLOAT16 ? to_bfloat16((double)(float)x)
           : dtype == NFI_FLOAT16  ? to_float16((double)(float)x)
                                   : (double)(float)x;
}

/* A constant times a number of a dtype, rounded as torch rounds it. */
static inline double times(double constant, double x, int dtype)
{
    if (dtype == NFI_FLOAT64) return constant * x;
    return to_dtype((double)((float)constant * (float)x), dtype);
}

/* One entry of the gradient. */
static inline double gradient_at(const nfi_rows_call *call, int64_t row, int64_t class)
{
    const int64_t at = row * call->grad_strides[0] + class * call->grad_strides[1];
    double value;
    if (call->grad_dtype == NFI_FLOAT32) return (double)((const float *)call->grad)[at];
    if (call->grad_dtype == NFI_FLOAT64) return ((const double *)call->grad)[at];
    nfi_in_use->load64(&value, (const uint16_t *)call->grad + at, call->grad_dtype, 1, 1, 1.0);
    return value;
}

/* Fill of [rows]. Returns how large the gradient of the correct class is at least in a misclassified row. */
double nfi_scan_gradient(const scratch *s, gradient_facts *of);
/* The largest logit of s->z, its class, the second largest, ln of the rest over the largest: top_logits. */
void nfi_find_top(const scratch *s, row_facts *row);
/* The correct class, and the kind of row. The largest logit and its class must be known. */
void nfi_find_kind(const scratch *s, int64_t at, const gradient_facts *g, double least, row_facts *row);
/* Fill in what a row that counts shows. Returns its mean logit. low: its smallest
 * gradient. s->z is the row; it may be another one after. */
double nfi_look_at_row(scratch *s, int64_t at, double low, const row_facts *row, double residual,
                       looked_at *seen);
/* Count the rows that show the kind of loss, and renew the facts about it. heaviest: zeros [classes]. */
void nfi_judge_loss(nfi_rows_call *call, looked_at *seen, double *heaviest, double *sums);

/* 1 - p of the correct class. */
static inline double nfi_residual(const row_facts *row)
{
    double loss = (row->largest - row->target_logit) + log1p(exp(row->log_rest));
    return -expm1(-loss);
}

#endif

/* Declarations shared by the C files. No torch, no Python: raw pointers and sizes only. */
#ifndef NFI_H
#define NFI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define NFI_PUBLIC __declspec(dllexport)
#else
#define NFI_PUBLIC __attribute__((visibility("default")))
#endif

/* Version of the functions' arguments: library.py refuses a library of another version. */
#define NFI_VERSION 1

enum nfi_dtype { NFI_FLOAT32, NFI_FLOAT64, NFI_BFLOAT16, NFI_FLOAT16 };

/* What one pass over a row [K] finds. NaN is left out of low, and sets nan. */
typedef struct {
    double sum, absolute;
    double low;
    int nan;
} nfi_scan;

/* The loops over elements, compiled once for each instruction set. */
typedef struct {
    void (*load32)(float *to, const void *from, int dtype, int64_t stride, int64_t n, float factor);
    void (*load64)(double *to, const void *from, int dtype, int64_t stride, int64_t n, double factor);
    nfi_scan (*scan32)(const float *x, int64_t n);
    nfi_scan (*scan64)(const double *x, int64_t n);
    float (*high32)(const float *x, int64_t n, int *nan);
    double (*high64)(const double *x, int64_t n, int *nan);
    int64_t (*first32)(const float *x, int64_t n, float value, int nan);
    int64_t (*first64)(const double *x, int64_t n, double value, int nan);
    double (*exp_sum32)(const float *x, int64_t n, float shift);
    double (*exp_sum64)(const double *x, int64_t n, double shift);
} nfi_kernels;

/* The kernels in use. Set when the library is loaded, and by nfi_select. */
extern const nfi_kernels *nfi_in_use;

/* The thresholds of measure/logit_scale.py, measure/shift_invariance.py and measure/rows.py. */
enum {
    ZERO_SUM, SURE, FEWEST, SAME, STRAIGHT, NEAR, SPREAD, STEEP,
    SAFETY, UNSURE, CLEARLY, RESOLVED, MISMATCH, THRESHOLDS
};

/* The facts about the loss, measure/rows.py: LossKind. */
enum { EPS, FLOOR, LEVEL, SCALE, SLOPE, FACTS };

enum {
    LIVE, ABSORBED, ABOVE_FLOOR, UNDERFLOWED, SILENT, FINITE,
    UNEXPLAINED, CONTRADICTED, UNSURE_ROWS, SOFT, MEAN_LOGIT,
    VIOLATION, SIGNED, ABSOLUTE, RESIDUAL_MASS,
    HEAD_LOSS, MAX_PROBABILITY,
    ROWS, SAMPLED, MEDIAN_ROWS, COUNTED, RECOMPUTED, SUMS
};
enum { VIOLATION_MAX, NEGATIVE_MARGIN, EPSILON, LOGIT_SCALE, MAXIMA };

typedef struct {
    const void *grad, *logits;
    int64_t grad_strides[2], logit_strides[2]; /* elements: rows, classes */
    int64_t rows, classes;
    int64_t total;   /* rows of the whole batch */
    int32_t grad_dtype, logit_dtype;
    int32_t wide;    /* sums are float64: one of both tensors is */
    int32_t look;    /* look at the kind of loss */
    double summation_error; /* measure/zero_sum.py, of the sums' dtype and this number of classes */
    double facts[FACTS];    /* in; with look, SCALE is also out */
    double thresholds[THRESHOLDS];
    void *sums, *maxima;        /* [SUMS], [MAXIMA] of the sums' dtype */
    void *counts, *absorbed;    /* [rows] of the sums' dtype */
    int64_t *winner;            /* [rows] */
} nfi_rows_call;

NFI_PUBLIC int nfi_version(void);
NFI_PUBLIC int nfi_select(int level);
NFI_PUBLIC int nfi_rows(nfi_rows_call *call);
NFI_PUBLIC int nfi_shown(const nfi_rows_call *call);
NFI_PUBLIC double nfi_logit_scale(nfi_rows_call *given);

#endif
